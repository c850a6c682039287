"""Attention of the persistent kernel: the token's query heads over the KV cache, split over as many CTAs as pay off.

A CTA takes a KV head and a split of the sequence (split-KV, Flash-Decoding), with the fragments and the online softmax
of `ops/cuda/attention/`; with one token, the query heads that share a KV head fill at most 8 rows of a fragment, and
the other 8 are left out (M/2). The newest key and value come through the mailbox, with q, and the CTA of the first
split adds them as one more partial result. So all keys that are read from the cache were written by earlier launches,
and the first ones are loaded before q has arrived.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import make_combine
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.persistent.heads import make_receive_heads
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    CTA_KEYS,
    MAX_QUERY_GROUP,
    WARP_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.split_kv import make_combine_splits, make_poll, make_store_out
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import STAGED
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class LayerCache(NamedTuple):
    """A layer's keys and values.

    Attributes:
        pairs: the KV cache, uint32 pairs of float16. keys_start, values_start: words at which the layer's begin.
    """

    pairs: Any
    keys_start: Any
    values_start: Any


def _make_receive_token(shape: PersistentShape, token_start: int, poll: Any) -> Any:
    """Device function (io, kv_head, newest, thread, shared): q of the CTA's heads and, with `newest`, the token's key
    and value, from the mailbox to shared memory.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    half = head_dim // 2
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v

    @ptx.device_function
    def scatter(halves, start, i, pair):
        """A pair of elements that RoPE rotated together, to their positions in a head."""
        halves[start + i] = np.uint16(pair & u32(0xFFFF))
        halves[start + i + half] = np.uint16(pair >> u32(16))

    @ptx.large_device_function
    def receive_token(io, kv_head, newest, thread, halves):
        received = cuda.local.array(2, uint32)
        q_loads, kv_loads = query_group * half // 2, half // 2
        entry = thread
        while entry < q_loads + (2 * kv_loads if newest else 0):
            if entry < q_loads:
                word = 2 * entry
                poll(io, q_start + kv_head * query_group * half + word, received)
                start = 2 * (x_start + word // half * pitch)
            else:
                other = entry - q_loads
                word = 2 * (other % kv_loads)
                index = k_start if other < kv_loads else v_start
                poll(io, index + kv_head * half + word, received)
                start = 2 * token_start + (0 if other < kv_loads else head_dim)
            scatter(halves, start, word % half, received[0])
            scatter(halves, start, word % half + 1, received[1])
            entry += CONSUMER_THREADS

    @ptx.device_function
    def receive(io, kv_head, newest, thread, shared):
        receive_token(io, kv_head, newest, thread, shared.halves)

    return receive


def _make_receive_sums(shape: PersistentShape, token_start: int) -> Any:
    """The same where q, k and v are finished here; with `newest` they are stored, too."""
    receive_heads = make_receive_heads(shape, token_start)

    @ptx.device_function
    def receive(io, kv_head, newest, thread, shared):
        receive_heads(io, kv_head, i32(0), i32(1), newest, newest, thread, shared)

    return receive


def _make_add_newest(shape: PersistentShape, token_start: int, out_start: int, stats_start: int, scale: Any) -> Any:
    """Device function (lane, warp, words, floats): the newest key's score and value, as a partial result of their own;
    one warp per query head.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    head_words = head_dim // 2

    @ptx.large_device_function
    def add_newest(lane, warp, words, floats):
        row = warp
        while row < query_group:
            dot = _ZERO
            word = lane
            while word < head_words:
                a, b = ptx.unpack_f16x2(words[x_start + row * pitch + word])
                c, d = ptx.unpack_f16x2(words[token_start + word])
                dot += a * c + b * d
                e, f = ptx.unpack_f16x2(words[token_start + head_words + word])
                index = out_start + (CONSUMER_WARPS * query_group + row) * head_dim + 2 * word
                floats[index], floats[index + 1] = e, f
                word += 32
            dot = ptx.warp_sum(dot)
            if lane == 0:
                index = stats_start + (CONSUMER_WARPS * query_group + row) * 2
                floats[index], floats[index + 1] = dot * scale, np.float32(1.0)
            row += CONSUMER_WARPS

    return add_newest


def make_store_result(shape: PersistentShape, out_start: int, stats_start: int, store_out: Any) -> Any:
    """Device function (io, cta_split, floats, thread): combine the partial results of the CTA's warps, in shared
    memory, and store the result, or the partial result of the KV split, to the mailbox.
    """
    head_dim, query_group, kv_splits, parts = shape.head_dim, shape.query_group, shape.kv_splits, shape.partial_results
    mailbox_partials, mailbox_stats = shape.mailbox.partials, shape.mailbox.softmax_stats
    combine, quads = make_combine(head_dim, query_group, out_start, stats_start), query_group * head_dim // 4
    publish = make_exchange(shape.ranks).store_own

    @ptx.device_function
    def store_result(io, cta_split, floats, thread):
        kv_head, split, active = cta_split.kv_head, cta_split.split, cta_split.active
        entry = thread
        while entry < quads:
            row, d = entry // (head_dim // 4), entry % (head_dim // 4) * 4
            if split == 0:  # two constants: the compiler interleaves the sums
                m, row_sum, o0, o1, o2, o3 = combine(floats, parts, row, d)
            else:
                m, row_sum, o0, o1, o2, o3 = combine(floats, CONSUMER_WARPS, row, d)
            if active == 1:
                inverse = _ONE / row_sum
                store_out(io, kv_head, entry * 2, o0 * inverse, o1 * inverse)
                store_out(io, kv_head, entry * 2 + 1, o2 * inverse, o3 * inverse)
            else:
                unit = (kv_head * kv_splits + split) * query_group + row
                index = mailbox_partials + unit * head_dim + d
                publish(io.mailbox, index, ptx.f32_bits(o0), io.flag)
                publish(io.mailbox, index + 1, ptx.f32_bits(o1), io.flag)
                publish(io.mailbox, index + 2, ptx.f32_bits(o2), io.flag)
                publish(io.mailbox, index + 3, ptx.f32_bits(o3), io.flag)
                if d == 0:
                    publish(io.mailbox, mailbox_stats + unit * 2, ptx.f32_bits(m), io.flag)
                    publish(io.mailbox, mailbox_stats + unit * 2 + 1, ptx.f32_bits(row_sum), io.flag)
            entry += CONSUMER_THREADS

    return store_result


def make_multiply_queries(shape: PersistentShape) -> Any:
    """Device function (words, q_regs, k_regs, g, t) -> scores of row g, before scaling: keys 2 t, 2 t + 1, 2 t + 8 and
    2 t + 9 of the 16 in `k_regs`.
    """
    fragments = make_head_fragments(shape.head_dim)
    wide, narrow, row_registers = fragments.wide, fragments.narrow, fragments.row_registers
    x_start, pitch, query_group = shape.x_start, shape.query_pitch, shape.query_group

    @ptx.device_function
    def multiply_queries(words, q_regs, k_regs, g, t):
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO
        q_row = x_start + min(g, query_group - 1) * pitch
        for c in range(wide + narrow):
            if c < wide:
                a0, a1, a2, a3 = ptx.load_shared_16(words, q_row + c * 16 + t * 4)
                q_regs[0], q_regs[1], q_regs[2], q_regs[3] = a0, a1, a2, a3
            else:
                a0, a1 = ptx.load_8(words, q_row + wide * 16 + t * 2)
                q_regs[0], q_regs[1] = a0, a1
            for i in range(2 if c < wide else 1):
                a0, a2, zero = q_regs[2 * i], q_regs[2 * i + 1], u32(0)
                base = 4 * c + 2 * i
                b0, b1 = k_regs[base], k_regs[base + 1]
                s0, s1, s2, s3 = ptx.mma(a0, zero, a2, zero, b0, b1, s0, s1, s2, s3)
                b0, b1 = k_regs[row_registers + base], k_regs[row_registers + base + 1]
                s4, s5, s6, s7 = ptx.mma(a0, zero, a2, zero, b0, b1, s4, s5, s6, s7)
        return s0, s1, s4, s5

    return multiply_queries


def make_attend(shape: PersistentShape, timestamp: Any) -> Any:
    """Device function (io, position, cta_split, cache, thread, shared): the attention of a layer.

    Arguments: io, `AttentionIo`; cta_split, `KvSplit`; cache, `LayerCache`; shared, `SharedMemory`.

    Args:
        timestamp: from `trace.make_timestamp`.
    """
    head_dim, query_group, kv_heads = shape.head_dim, shape.query_group, shape.kv_heads
    head_words, kv_row = head_dim // 2, shape.kv_heads * head_dim // 2
    fragments = make_head_fragments(head_dim)
    row_registers, value_registers = fragments.row_registers, fragments.value_registers
    load_row, load_value, element = fragments.load_row, fragments.load_value, fragments.element
    k_registers, v_registers = 2 * row_registers, 4 * value_registers
    softmax_step = make_softmax_step(value_registers, half_tile=True)
    out_registers = head_dim // 4
    # After the queries, the newest key and its value, head_dim float16 each; then the partial results.
    token_start = shape.x_start + MAX_QUERY_GROUP * shape.query_pitch
    out_start = token_start + head_dim
    stats_start = out_start + shape.partial_results * query_group * head_dim
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))
    (poll, poll_both), store_out = make_poll(make_exchange(shape.ranks).load_own), make_store_out(shape)
    if shape.rope_in_attention:
        receive = _make_receive_sums(shape, token_start)
    else:
        receive = _make_receive_token(shape, token_start, poll)
    add_newest = _make_add_newest(shape, token_start, out_start, stats_start, scale)
    multiply_queries = make_multiply_queries(shape)
    store_result = make_store_result(shape, out_start, stats_start, store_out)
    combine_splits = make_combine_splits(shape, poll_both, store_out)

    @ptx.device_function
    def load_keys(cache, start, base, last, kv_head, g, t, k_regs):
        """A lane's part of the next 16 keys; beyond the end, the last key is loaded again."""
        for h in range(2):
            key = min(i32(base + h * 8 + g), last)
            load_row(cache, start + i32(key * kv_row + kv_head * head_words), t, k_regs, h * row_registers)

    @ptx.device_function
    def load_values(cache, start, base, last, kv_head, g, t, v_regs):
        for i in range(4):
            key = min(i32(base + 2 * t + i % 2 + i // 2 * 8), last)
            load_value(cache, start + i32(key * kv_row + kv_head * head_words), g, v_regs, i * value_registers)

    @ptx.large_device_function
    def attend(io, position, cta_split, cache, thread, shared):
        kv_head, split, keys, active = cta_split.kv_head, cta_split.split, cta_split.keys, cta_split.active
        words, floats = shared.words, shared.floats
        q_regs = cuda.local.array(4, uint32)
        k_regs = cuda.local.array(k_registers, uint32)
        v_regs = cuda.local.array(v_registers, uint32)
        out_regs = cuda.local.array(out_registers, float32)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        if kv_head < kv_heads and split < active:
            end = min(position, i32((split + 1) * keys))
            base = i32(split * keys + warp * WARP_KEYS)
            last = i32(end - 1)
            if base < end:
                load_keys(cache.pairs, cache.keys_start, base, last, kv_head, g, t, k_regs)
                load_values(cache.pairs, cache.values_start, base, last, kv_head, g, t, v_regs)
            receive(io, kv_head, split == 0, thread, shared)
            sync_consumers()
            if thread == 0:
                timestamp(io.timestamps, io.op, STAGED)
            for i in range(out_registers):
                out_regs[i] = _ZERO
            running_max, row_sum = LOWEST, _ZERO
            while base < end:
                next_base = i32(base + CTA_KEYS)
                s0, s1, s4, s5 = multiply_queries(words, q_regs, k_regs, g, t)
                # The next keys are loaded during softmax and P V, the next values after that.
                if next_base < end:
                    load_keys(cache.pairs, cache.keys_start, next_base, last, kv_head, g, t, k_regs)
                key = base + 2 * t
                s0 = s0 * scale if key < end else LOWEST
                s1 = s1 * scale if key + 1 < end else LOWEST
                s4 = s4 * scale if key + 8 < end else LOWEST
                s5 = s5 * scale if key + 9 < end else LOWEST
                scores = s0, s1, _ZERO, _ZERO, s4, s5, _ZERO, _ZERO
                running_max, _, row_sum, _ = softmax_step(running_max, LOWEST, row_sum, _ZERO, scores, v_regs, out_regs)
                if next_base < end:
                    load_values(cache.pairs, cache.values_start, next_base, last, kv_head, g, t, v_regs)
                base = next_base

            # The warps' partial results, and that of the newest key, are combined in shared memory.
            row_sum = quad_sum(row_sum)
            if g < query_group:
                for j in range(out_registers // 2):
                    for column in range(2):
                        index = out_start + (warp * query_group + g) * head_dim + element(t, column, j)
                        floats[index] = out_regs[2 * j + column]
                if t == 0:
                    index = stats_start + (warp * query_group + g) * 2
                    floats[index], floats[index + 1] = running_max, row_sum
            if split == 0:
                add_newest(lane, warp, words, floats)
            sync_consumers()
            store_result(io, cta_split, floats, thread)
            if active > 1:
                combine_splits(io, cta_split, thread)
            sync_consumers()

    return attend
