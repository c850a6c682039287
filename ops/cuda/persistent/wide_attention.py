"""Attention of the persistent kernel for several columns (tokens at consecutive positions).

Each column is cut into KV splits as a step of one token at its position is, and each split is computed as there, bit
for bit; the splits of all columns are distributed over the CTAs of their KV head. Keys and values of this step's own
tokens may not be in the cache yet, so a CTA receives them with the queries, and takes them from shared memory where a
column has them among its past.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.persistent.attention import make_multiply_queries, make_store_result
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    CTA_KEYS,
    MAX_QUERY_GROUP,
    WARP_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.split_kv import KvSplit, make_combine_splits, make_kv_split, make_poll
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO = np.float32(0.0)


class ColumnIo(NamedTuple):
    """What the attention of a column reads and writes.

    Attributes:
        mailbox: as in `WideArguments`. flag: of the layer's results. watchdog: `Watchdog`.
        column: its number.
    """

    mailbox: Any
    flag: Any
    watchdog: Any
    column: Any


class LayerPast(NamedTuple):
    """A layer's keys and values.

    Attributes:
        pairs: the KV cache, uint32 pairs of float16. keys_start, values_start: words at which the layer's begin.
        positions: those before this step, whose keys and values are in the cache.
    """

    pairs: Any
    keys_start: Any
    values_start: Any
    positions: Any


def _make_receive_tokens(shape: PersistentShape, token_start: int, poll: Any) -> Any:
    """Device function (io, kv_head, with_keys, thread, halves): the column's q of the CTA's heads and, `with_keys`, the
    keys and values of all columns, from the mailbox to shared memory.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    half, columns = head_dim // 2, shape.columns
    q_pitch, kv_pitch = shape.heads * half, shape.kv_heads * half
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v

    @ptx.device_function
    def scatter(halves, start, i, pair):
        """A pair of elements that RoPE rotated together, to their positions in a head."""
        halves[start + i] = np.uint16(pair & u32(0xFFFF))
        halves[start + i + half] = np.uint16(pair >> u32(16))

    @ptx.large_device_function
    def receive_tokens(io, kv_head, with_keys, thread, halves):
        received = cuda.local.array(2, uint32)
        q_loads, kv_loads = query_group * half // 2, half // 2
        entry = thread
        while entry < q_loads + (2 * columns * kv_loads if with_keys else 0):
            if entry < q_loads:
                word = 2 * entry
                poll(io, q_start + io.column * q_pitch + kv_head * query_group * half + word, received)
                start = 2 * (x_start + word // half * pitch)
            else:
                row, word = (entry - q_loads) // kv_loads, 2 * ((entry - q_loads) % kv_loads)
                index = (k_start if row % 2 == 0 else v_start) + row // 2 * kv_pitch
                poll(io, index + kv_head * half + word, received)
                start = 2 * token_start + row * head_dim
            scatter(halves, start, word % half, received[0])
            scatter(halves, start, word % half + 1, received[1])
            entry += CONSUMER_THREADS

    return receive_tokens


def _make_add_newest(shape: PersistentShape, token_start: int, out_start: int, stats_start: int, scale: Any) -> Any:
    """Device function (column, lane, warp, words, floats): the score and value of the column's own key, as a partial
    result of their own; one warp per query head.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    head_words = head_dim // 2

    @ptx.large_device_function
    def add_newest(column, lane, warp, words, floats):
        token = token_start + column * head_dim
        row = warp
        while row < query_group:
            dot = _ZERO
            word = lane
            while word < head_words:
                a, b = ptx.unpack_f16x2(words[x_start + row * pitch + word])
                c, d = ptx.unpack_f16x2(words[token + word])
                dot += a * c + b * d
                e, f = ptx.unpack_f16x2(words[token + head_words + word])
                index = out_start + (CONSUMER_WARPS * query_group + row) * head_dim + 2 * word
                floats[index], floats[index + 1] = e, f
                word += 32
            dot = ptx.warp_sum(dot)
            if lane == 0:
                index = stats_start + (CONSUMER_WARPS * query_group + row) * 2
                floats[index], floats[index + 1] = dot * scale, np.float32(1.0)
            row += CONSUMER_WARPS

    return add_newest


def _make_store_out(shape: PersistentShape) -> Any:
    """Device function (io, head, pair, low, high): two elements of a result; head: KV head, counted over columns."""
    start, pairs = shape.mailbox.attn_out, shape.query_group * shape.head_dim // 2

    @ptx.device_function
    def store_out(io, head, pair, low, high):
        ptx.ll_store(io.mailbox, start + head * pairs + pair, ptx.pack_f16x2(low, high), io.flag)

    return store_out


def _make_of_column(shape: PersistentShape) -> Any:
    """Device function (column, cta_split) -> the `KvSplit` with its KV head counted over all columns."""
    kv_heads = shape.kv_heads

    @ptx.device_function
    def of_column(column, cta_split):
        head = i32(column * kv_heads + cta_split.kv_head)
        return KvSplit(head, cta_split.split, cta_split.keys, cta_split.active)

    return of_column


def _make_load_past(shape: PersistentShape, token_start: int) -> tuple[Any, Any]:
    """Device functions (past, words, base, last, kv_head, g, t, registers, with_tokens): a lane's part of the next 16
    keys, or values; beyond the end, those of position `last` again. `with_tokens`: those of this step, too, from shared
    memory; otherwise their registers are yet to be loaded.
    """
    head_words, kv_row = shape.head_dim // 2, shape.kv_heads * shape.head_dim // 2
    fragments = make_head_fragments(shape.head_dim)
    row_registers, value_registers = fragments.row_registers, fragments.value_registers
    load_row, load_value = fragments.load_row, fragments.load_value

    @ptx.device_function
    def load_keys(past, words, base, last, kv_head, g, t, k_regs, with_tokens):
        for h in range(2):
            key = min(i32(base + h * 8 + g), last)
            if key < past.positions:
                load_row(
                    past.pairs, past.keys_start + i32(key * kv_row + kv_head * head_words), t, k_regs, h * row_registers
                )
            elif with_tokens:
                token = i32(token_start + (key - past.positions) * 2 * head_words)
                load_row(words, token, t, k_regs, h * row_registers)

    @ptx.device_function
    def load_values(past, words, base, last, kv_head, g, t, v_regs, with_tokens):
        for i in range(4):
            key = min(i32(base + 2 * t + i % 2 + i // 2 * 8), last)
            if key < past.positions:
                start = past.values_start + i32(key * kv_row + kv_head * head_words)
                load_value(past.pairs, start, g, v_regs, i * value_registers)
            elif with_tokens:
                token = i32(token_start + (key - past.positions) * 2 * head_words + head_words)
                load_value(words, token, g, v_regs, i * value_registers)

    return load_keys, load_values


def make_attend_columns(shape: PersistentShape) -> Any:
    """Device function (mailbox, flag, watchdog, past, thread, shared): the attention of a layer, of all columns.

    Arguments: flag, of the layer's results; past, `LayerPast`; shared, `SharedMemory`.
    """
    kv_heads, kv_splits, columns = shape.kv_heads, shape.kv_splits, shape.columns
    poll, poll_both = make_poll()
    store_out = _make_store_out(shape)
    kv_split, of_column = make_kv_split(shape), _make_of_column(shape)
    attend = _make_attend_split(shape, poll, store_out)
    combine_splits = make_combine_splits(shape, poll_both, store_out)

    @ptx.device_function
    def split_of(position, first):
        """The CTA's split of a column at this position, and the first split of the next column, counted over all."""
        cut = kv_split(position)
        slot = i32(i32(cuda.blockIdx.x) % kv_splits)
        split = i32((slot - first % kv_splits + kv_splits) % kv_splits)
        return KvSplit(cut.kv_head, split, cut.keys, cut.active), i32(first + cut.active)

    @ptx.large_device_function
    def attend_columns(mailbox, flag, watchdog, past, thread, shared):
        if i32(cuda.blockIdx.x) // kv_splits < kv_heads:
            first, column, received = i32(0), i32(0), False
            while column < columns:
                cta_split, first = split_of(past.positions + column, first)
                if cta_split.split < cta_split.active:
                    io = ColumnIo(mailbox, flag, watchdog, column)
                    attend(io, cta_split, past, not received, thread, shared)
                    received = True
                column = i32(column + 1)
            # After the partial results of all columns: no CTA waits for one that waits for another column.
            first, column = i32(0), i32(0)
            while column < columns:
                cta_split, first = split_of(past.positions + column, first)
                if cta_split.split < cta_split.active and cta_split.active > 1:
                    io = ColumnIo(mailbox, flag, watchdog, column)
                    combine_splits(io, of_column(column, cta_split), thread)
                column = i32(column + 1)
        sync_consumers()

    return attend_columns


def _make_attend_split(shape: PersistentShape, poll: Any, store_out: Any) -> Any:
    """Device function (io, cta_split, past, with_keys, thread, shared): a KV split of a column.

    Arguments: io, `ColumnIo`; cta_split, `KvSplit`; past, `LayerPast`; with_keys, the keys and values of the step's
    tokens are to be received, too; shared, `SharedMemory`.
    """
    head_dim, query_group = shape.head_dim, shape.query_group
    fragments = make_head_fragments(head_dim)
    row_registers, value_registers, element = fragments.row_registers, fragments.value_registers, fragments.element
    k_registers, v_registers = 2 * row_registers, 4 * value_registers
    softmax_step = make_softmax_step(value_registers, half_tile=True)
    out_registers = head_dim // 4
    # After the queries, keys and values of the step's tokens, head_dim float16 each; then the partial results.
    token_start = shape.x_start + MAX_QUERY_GROUP * shape.query_pitch
    out_start = token_start + shape.columns * head_dim
    stats_start = out_start + shape.partial_results * query_group * head_dim
    scale = np.float32(math.log2(math.e) / math.sqrt(head_dim))
    receive_tokens = _make_receive_tokens(shape, token_start, poll)
    add_newest = _make_add_newest(shape, token_start, out_start, stats_start, scale)
    multiply_queries = make_multiply_queries(shape)
    store_result = make_store_result(shape, out_start, stats_start, store_out)
    load_keys, load_values = _make_load_past(shape, token_start)
    of_column = _make_of_column(shape)

    @ptx.large_device_function
    def attend(io, cta_split, past, with_keys, thread, shared):
        kv_head, split, keys = cta_split.kv_head, cta_split.split, cta_split.keys
        words, floats = shared.words, shared.floats
        q_regs = cuda.local.array(4, uint32)
        k_regs = cuda.local.array(k_registers, uint32)
        v_regs = cuda.local.array(v_registers, uint32)
        out_regs = cuda.local.array(out_registers, float32)
        for i in range(k_registers):
            k_regs[i] = u32(0)
        for i in range(v_registers):
            v_regs[i] = u32(0)
        lane, warp = thread & 31, thread >> 5
        g, t = lane >> 2, lane & 3
        end = min(i32(past.positions + io.column), i32((split + 1) * keys))
        base = i32(split * keys + warp * WARP_KEYS)
        last = i32(end - 1)
        if base < end:
            load_keys(past, words, base, last, kv_head, g, t, k_regs, False)
            load_values(past, words, base, last, kv_head, g, t, v_regs, False)
        receive_tokens(io, kv_head, with_keys, thread, shared.halves)
        sync_consumers()
        if base < end and min(base + WARP_KEYS, end) > past.positions:
            load_keys(past, words, base, last, kv_head, g, t, k_regs, True)
            load_values(past, words, base, last, kv_head, g, t, v_regs, True)
        for i in range(out_registers):
            out_regs[i] = _ZERO
        running_max, row_sum = LOWEST, _ZERO
        while base < end:
            next_base = i32(base + CTA_KEYS)
            s0, s1, s4, s5 = multiply_queries(words, q_regs, k_regs, g, t)
            # The next keys are loaded during softmax and P V, the next values after that.
            if next_base < end:
                load_keys(past, words, next_base, last, kv_head, g, t, k_regs, True)
            key = base + 2 * t
            s0 = s0 * scale if key < end else LOWEST
            s1 = s1 * scale if key + 1 < end else LOWEST
            s4 = s4 * scale if key + 8 < end else LOWEST
            s5 = s5 * scale if key + 9 < end else LOWEST
            scores = s0, s1, _ZERO, _ZERO, s4, s5, _ZERO, _ZERO
            running_max, _, row_sum, _ = softmax_step(running_max, LOWEST, row_sum, _ZERO, scores, v_regs, out_regs)
            if next_base < end:
                load_values(past, words, next_base, last, kv_head, g, t, v_regs, True)
            base = next_base

        # The warps' partial results, and that of the column's own key, are combined in shared memory.
        row_sum = quad_sum(row_sum)
        if g < query_group:
            for j in range(out_registers // 2):
                for side in range(2):
                    index = out_start + (warp * query_group + g) * head_dim + element(t, side, j)
                    floats[index] = out_regs[2 * j + side]
            if t == 0:
                index = stats_start + (warp * query_group + g) * 2
                floats[index], floats[index + 1] = running_max, row_sum
        if split == 0:
            add_newest(io.column, lane, warp, words, floats)
        sync_consumers()
        store_result(io, of_column(io.column, cta_split), floats, thread)
        sync_consumers()

    return attend
