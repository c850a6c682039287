"""A KV split of a group of columns: past keys from the cache, and those of this step's tokens from shared memory."""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.heads import make_receive_heads
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    CTA_KEYS,
    WARP_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.persistent.wide_results import make_store_result
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO = np.float32(0.0)
# The score of a masked key. In a row of which all keys are masked it is not the maximum (that stays `LOWEST`), and its
# weight is 0; elsewhere its weight is 0 as that of `LOWEST` is.
_MASKED = np.float32(-np.inf)


def _make_receive_tokens(shape: PersistentShape, token_start: int) -> Any:
    """Device function (io, group, with_keys, thread, shared): the group's q of the CTA's heads and, `with_keys`, the
    keys and values of all columns, from the mailbox to shared memory; all loads are issued together.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    half, columns = head_dim // 2, shape.columns
    q_pitch, kv_pitch = shape.heads * half, shape.kv_heads * half
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v
    q_loads, kv_loads = query_group * half // 2, half // 2  # of a column, and of its key
    most = shape.attention_columns * q_loads + 2 * columns * kv_loads
    rounds = -(-most // CONSUMER_THREADS)
    registers, load = 4 * rounds, make_exchange(shape.ranks).load_own

    @ptx.device_function
    def scatter(halves, start, i, pair):
        """A pair of elements that RoPE rotated together, to their positions in a head."""
        halves[start + i] = np.uint16(pair & u32(0xFFFF))
        halves[start + i + half] = np.uint16(pair >> u32(16))

    @ptx.device_function
    def place(group, all_q_loads, entry):
        """Words of the mailbox from this one on, the half of shared memory at which their head begins, and the pair."""
        if entry < all_q_loads:
            column, word = i32(entry // u32(q_loads)), i32(u32(2) * (entry % u32(q_loads)))
            row = i32(column * query_group + i32(u32(word) // u32(half)))
            index = i32(q_start + (group.first + column) * q_pitch + group.kv_head * query_group * half + word)
            return index, i32(2 * (x_start + row * pitch)), i32(u32(word) % u32(half))
        other = u32(entry - all_q_loads)
        row, word = i32(other // u32(kv_loads)), i32(u32(2) * (other % u32(kv_loads)))
        index = i32((v_start if row & 1 else k_start) + (row >> 1) * kv_pitch + group.kv_head * half + word)
        return index, i32(2 * token_start + row * head_dim), word

    @ptx.large_device_function
    def receive_tokens(io, group, with_keys, thread, halves):
        received = cuda.local.array(registers, uint32)
        mailbox, flag, polls, waiting = io.mailbox, io.flag, u32(0), True
        all_q_loads = u32(group.count * q_loads)
        last = u32(all_q_loads + u32(2 * columns * kv_loads if with_keys else 0) - u32(1))
        while waiting:
            waiting = False
            for i in range(rounds):
                index, _, _ = place(group, all_q_loads, min(u32(i * CONSUMER_THREADS + thread), last))
                w0, w1, w2, w3 = load(mailbox, index)
                received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3] = w0, w1, w2, w3
            for i in range(rounds):
                if received[4 * i + 1] != flag or received[4 * i + 3] != flag:
                    waiting = True
            polls = u32(polls + u32(1))
            if waiting and watchdog_trips(io.watchdog, polls):
                waiting = False
        for i in range(rounds):
            _, start, pair = place(group, all_q_loads, min(u32(i * CONSUMER_THREADS + thread), last))
            scatter(halves, start, pair, received[4 * i])
            scatter(halves, start, pair + 1, received[4 * i + 2])

    @ptx.device_function
    def receive(io, group, with_keys, thread, shared):
        receive_tokens(io, group, with_keys, thread, shared.halves)

    return receive


def _make_receive_sums(shape: PersistentShape, token_start: int) -> Any:
    """The same where q, k and v are finished here. Keys and values are stored by the CTA that has the first split of
    the first column.
    """
    receive_heads = make_receive_heads(shape, token_start)

    @ptx.device_function
    def receive(io, group, with_keys, thread, shared):
        stores = group.first == 0 and group.split == 0
        receive_heads(io, group.kv_head, group.first, group.count, with_keys, stores, thread, shared)

    return receive


def _make_add_newest(shape: PersistentShape, token_start: int, out_start: int, stats_start: int, scale: Any) -> Any:
    """Device function (group, lane, warp, words, floats): the score and value of each column's own key, as a partial
    result of their own; one warp per row.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    head_words, rows = head_dim // 2, shape.attention_rows

    @ptx.large_device_function
    def add_newest(group, lane, warp, words, floats):
        row = warp
        while row < group.count * query_group:
            token = token_start + (group.first + row // query_group) * head_dim
            dot = _ZERO
            word = lane
            while word < head_words:
                a, b = ptx.unpack_f16x2(words[x_start + row * pitch + word])
                c, d = ptx.unpack_f16x2(words[token + word])
                dot += a * c + b * d
                e, f = ptx.unpack_f16x2(words[token + head_words + word])
                index = out_start + (CONSUMER_WARPS * rows + row) * head_dim + 2 * word
                floats[index], floats[index + 1] = e, f
                word += 32
            dot = ptx.warp_sum(dot)
            if lane == 0:
                index = stats_start + (CONSUMER_WARPS * rows + row) * 2
                floats[index], floats[index + 1] = dot * scale, np.float32(1.0)
            row += CONSUMER_WARPS

    return add_newest


class KvLoads(NamedTuple):
    """Device functions that fill a lane's registers with its part of 16 keys, or values. Beyond the end, those of
    position `last` are loaded again.

    Attributes:
        keys, values: (past, base, last, kv_head, g, t, registers): from the cache; instead of those of this step, some
            others. There is no branch: it would wait for what is loaded in it.
        token_keys, token_values: (past, words, base, last, g, t, registers): those of this step, from shared memory.
    """

    keys: Any
    values: Any
    token_keys: Any
    token_values: Any


def _make_kv_loads(shape: PersistentShape, token_start: int) -> KvLoads:
    head_words, kv_row = shape.head_dim // 2, shape.kv_heads * shape.head_dim // 2
    fragments = make_head_fragments(shape.head_dim)
    row_registers, value_registers = fragments.row_registers, fragments.value_registers
    load_row, load_value = fragments.load_row, fragments.load_value

    @ptx.device_function
    def load_keys(past, base, last, kv_head, g, t, k_regs):
        cached = i32(max(min(last, past.positions - 1), 0))
        for h in range(2):
            key = min(i32(base + h * 8 + g), cached)
            start = past.keys_start + i32(key * kv_row + kv_head * head_words)
            load_row(past.pairs, start, t, k_regs, h * row_registers)

    @ptx.device_function
    def load_values(past, base, last, kv_head, g, t, v_regs):
        cached = i32(max(min(last, past.positions - 1), 0))
        for i in range(4):
            key = min(i32(base + 2 * t + i % 2 + i // 2 * 8), cached)
            start = past.values_start + i32(key * kv_row + kv_head * head_words)
            load_value(past.pairs, start, g, v_regs, i * value_registers)

    @ptx.device_function
    def load_token_keys(past, words, base, last, g, t, k_regs):
        for h in range(2):
            token = i32(min(i32(base + h * 8 + g), last) - past.positions)
            if token >= 0:
                load_row(words, i32(token_start + token * 2 * head_words), t, k_regs, h * row_registers)

    @ptx.device_function
    def load_token_values(past, words, base, last, g, t, v_regs):
        for i in range(4):
            token = i32(min(i32(base + 2 * t + i % 2 + i // 2 * 8), last) - past.positions)
            if token >= 0:
                start = i32(token_start + (2 * token + 1) * head_words)
                load_value(words, start, g, v_regs, i * value_registers)

    return KvLoads(load_keys, load_values, load_token_keys, load_token_values)


def _make_multiply_queries(shape: PersistentShape) -> Any:
    """Device function (words, q_regs, k_regs, last_row, g, t) -> scores s0 .. s7 before scaling, laid out as
    `attention/softmax.py` says: of rows g and g + 8 for 16 keys. Rows after the last one repeat it.
    """
    fragments = make_head_fragments(shape.head_dim)
    wide, narrow, row_registers = fragments.wide, fragments.narrow, fragments.row_registers
    x_start, pitch, half_tile = shape.x_start, shape.query_pitch, shape.attention_half_tile

    @ptx.device_function
    def load_queries(words, row_start, c, t, q_regs, first):
        if c < wide:
            a0, a1, a2, a3 = ptx.load_shared_16(words, row_start + c * 16 + t * 4)
            q_regs[first], q_regs[first + 1], q_regs[first + 2], q_regs[first + 3] = a0, a1, a2, a3
        else:
            a0, a1 = ptx.load_8(words, row_start + wide * 16 + t * 2)
            q_regs[first], q_regs[first + 1] = a0, a1

    @ptx.device_function
    def multiply_queries(words, q_regs, k_regs, last_row, g, t):
        s0, s1, s2, s3 = _ZERO, _ZERO, _ZERO, _ZERO
        s4, s5, s6, s7 = _ZERO, _ZERO, _ZERO, _ZERO
        low, high = x_start + min(g, last_row) * pitch, x_start + min(g + 8, last_row) * pitch
        for i in range(8):
            q_regs[i] = u32(0)
        for c in range(wide + narrow):
            load_queries(words, low, c, t, q_regs, 0)
            if not half_tile:
                load_queries(words, high, c, t, q_regs, 4)
            for i in range(2 if c < wide else 1):
                a0, a2, a1, a3 = q_regs[2 * i], q_regs[2 * i + 1], q_regs[4 + 2 * i], q_regs[5 + 2 * i]
                base = 4 * c + 2 * i
                b0, b1 = k_regs[base], k_regs[base + 1]
                s0, s1, s2, s3 = ptx.mma(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
                b0, b1 = k_regs[row_registers + base], k_regs[row_registers + base + 1]
                s4, s5, s6, s7 = ptx.mma(a0, a1, a2, a3, b0, b1, s4, s5, s6, s7)
        return s0, s1, s2, s3, s4, s5, s6, s7

    return multiply_queries


def make_attend_group(shape: PersistentShape) -> Any:
    """Device function (io, group, past, with_keys, thread, shared): a KV split of the group's columns.

    Arguments: io, `ColumnsIo`; group, `Group`; past, `LayerPast`; with_keys, the keys and values of the step's tokens
    are to be received, too; shared, `SharedMemory`.
    """
    head_dim, query_group, rows, half_tile = (
        shape.head_dim,
        shape.query_group,
        shape.attention_rows,
        shape.attention_half_tile,
    )
    fragments = make_head_fragments(head_dim)
    row_registers, value_registers, element = fragments.row_registers, fragments.value_registers, fragments.element
    k_registers, v_registers = 2 * row_registers, 4 * value_registers
    softmax_step = make_softmax_step(value_registers, half_tile=half_tile)
    out_pitch = 2 if half_tile else 4  # registers of a fragment of the result
    out_registers = head_dim // 8 * out_pitch
    # After the queries, keys and values of the step's tokens, head_dim float16 each; then the partial results.
    token_start = shape.x_start + shape.query_rows * shape.query_pitch
    out_start = token_start + shape.columns * head_dim
    stats_start = out_start + shape.partial_results * rows * head_dim
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))
    make_receive = _make_receive_sums if shape.rope_in_attention else _make_receive_tokens
    receive = make_receive(shape, token_start)
    add_newest = _make_add_newest(shape, token_start, out_start, stats_start, scale)
    multiply_queries = _make_multiply_queries(shape)
    store_result = make_store_result(shape, out_start, stats_start)
    load_keys, load_values, load_token_keys, load_token_values = _make_kv_loads(shape, token_start)

    @ptx.device_function
    def masked(s, key, end):
        return s * scale if key < end else _MASKED

    @ptx.device_function
    def store_row(floats, warp, row, high, t, out_regs, running_max, row_sum):
        """A warp's partial result of a row: of the lower 8 rows, or of the higher ones."""
        start = out_start + (warp * rows + row) * head_dim
        for j in range(head_dim // 8):
            for side in range(2):
                floats[start + element(t, side, j)] = out_regs[out_pitch * j + 2 * high + side]
        if t == 0:
            index = stats_start + (warp * rows + row) * 2
            floats[index], floats[index + 1] = running_max, row_sum

    @ptx.large_device_function
    def attend(io, group, past, with_keys, thread, shared):
        kv_head, split, keys = group.kv_head, group.split, group.keys
        words, floats = shared.words, shared.floats
        q_regs = cuda.local.array(8, uint32)
        k_regs = cuda.local.array(k_registers, uint32)
        v_regs = cuda.local.array(v_registers, uint32)
        out_regs = cuda.local.array(out_registers, float32)
        for i in range(k_registers):
            k_regs[i] = u32(0)
        for i in range(v_registers):
            v_regs[i] = u32(0)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        split_end, group_rows = i32((split + 1) * keys), i32(group.count * query_group)
        end = min(i32(past.positions + group.first + group.count - 1), split_end)
        low_end = min(i32(past.positions + group.first + g // query_group), split_end)
        high_end = min(i32(past.positions + group.first + (g + 8) // query_group), split_end)
        base = i32(split * keys + warp * WARP_KEYS)
        last = i32(end - 1)
        if base < end:
            load_keys(past, base, last, kv_head, g, t, k_regs)
            load_values(past, base, last, kv_head, g, t, v_regs)
        receive(io, group, with_keys, thread, shared)
        sync_consumers()
        if base < end and min(base + WARP_KEYS, end) > past.positions:
            load_token_keys(past, words, base, last, g, t, k_regs)
            load_token_values(past, words, base, last, g, t, v_regs)
        for i in range(out_registers):
            out_regs[i] = _ZERO
        low_max, high_max, low_sum, high_sum = LOWEST, LOWEST, _ZERO, _ZERO
        while base < end:
            next_base = i32(base + CTA_KEYS)
            s0, s1, s2, s3, s4, s5, s6, s7 = multiply_queries(words, q_regs, k_regs, i32(group_rows - 1), g, t)
            # The next keys are loaded during softmax and P V, the next values after that.
            if next_base < end:
                load_keys(past, next_base, last, kv_head, g, t, k_regs)
                if min(next_base + WARP_KEYS, end) > past.positions:
                    load_token_keys(past, words, next_base, last, g, t, k_regs)
            key = base + 2 * t
            s0, s1 = masked(s0, key, low_end), masked(s1, key + 1, low_end)
            s4, s5 = masked(s4, key + 8, low_end), masked(s5, key + 9, low_end)
            if not half_tile:
                s2, s3 = masked(s2, key, high_end), masked(s3, key + 1, high_end)
                s6, s7 = masked(s6, key + 8, high_end), masked(s7, key + 9, high_end)
            scores = s0, s1, s2, s3, s4, s5, s6, s7
            low_max, high_max, low_sum, high_sum = softmax_step(
                low_max, high_max, low_sum, high_sum, scores, v_regs, out_regs
            )
            if next_base < end:
                load_values(past, next_base, last, kv_head, g, t, v_regs)
                if min(next_base + WARP_KEYS, end) > past.positions:
                    load_token_values(past, words, next_base, last, g, t, v_regs)
            base = next_base

        # The warps' partial results, and those of the columns' own keys, are combined in shared memory.
        low_sum, high_sum = quad_sum(low_sum), high_sum if half_tile else quad_sum(high_sum)
        if g < group_rows:
            store_row(floats, warp, g, 0, t, out_regs, low_max, low_sum)
        if not half_tile and g + 8 < group_rows:
            store_row(floats, warp, g + 8, 1, t, out_regs, high_max, high_sum)
        if split == 0:
            add_newest(group, lane, warp, words, floats)
        sync_consumers()
        store_result(io, group, floats, thread)
        sync_consumers()

    return attend
