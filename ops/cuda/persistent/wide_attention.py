"""Attention of the persistent kernel for several columns (tokens at consecutive positions).

Each column is cut into KV splits as a step of one token at its position is, and each split is computed as there, bit
for bit. Columns whose splits have the same bounds are computed together, as many as have 16 rows of query heads: their
keys and values are read once, and a row of the mma is masked behind its own column's past. A context that is one split
needs few keys, and there each column is computed by a CTA of its own. Keys and values of this step's own tokens may not
be in the cache yet, so a CTA receives them with the queries, and takes them from shared memory where a column has them
among its past.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import make_combine
from numba_atomflow.ops.cuda.attention.fragments import make_head_fragments
from numba_atomflow.ops.cuda.attention.softmax import LOWEST, make_softmax_step, quad_sum
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    CTA_KEYS,
    ONE_SPLIT_KEYS,
    WARP_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.split_kv import make_split_keys, make_team
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import STAGED
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
# The score of a masked key. In a row of which all keys are masked it is not the maximum (that stays `LOWEST`), and its
# weight is 0; elsewhere its weight is 0 as that of `LOWEST` is.
_MASKED = np.float32(-np.inf)
_COMBINED = 4  # pairs of elements whose partial results a thread receives at once


class ColumnsIo(NamedTuple):
    """What the attention of all columns reads and writes.

    Attributes:
        mailbox, timestamps: as in `WideArguments`. op: its number. flag: of the layer's results.
        watchdog: `Watchdog`.
    """

    mailbox: Any
    timestamps: Any
    op: Any
    flag: Any
    watchdog: Any


class Group(NamedTuple):
    """Columns that are computed together, and a CTA's part of them.

    Attributes:
        first, count: the columns.
        kv_head: of the CTA. split: its number among the splits of the sequence; out of range without work.
        keys: per split.
        first_active: splits with keys of the first column. active, more_from: those of the last one, and the first
            column that has as many.
    """

    first: Any
    count: Any
    kv_head: Any
    split: Any
    keys: Any
    first_active: Any
    active: Any
    more_from: Any


@ptx.device_function
def _active_splits(group, column):
    """Splits of a column that have keys; 1 where it has no past."""
    return group.active if column >= group.more_from else group.first_active


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


def make_attend_columns(shape: PersistentShape, timestamp: Any) -> Any:
    """Device function (io, past, thread, shared): the attention of a layer, of all columns.

    Arguments: io, `ColumnsIo`; past, `LayerPast`; shared, `SharedMemory`.

    Args:
        timestamp: from `trace.make_timestamp`.
    """
    kv_heads, kv_splits, columns = shape.kv_heads, shape.kv_splits, shape.columns
    next_group, attend, combine_splits = _make_next_group(shape), _make_attend_group(shape), _make_combine_splits(shape)

    @ptx.large_device_function
    def attend_columns(io, past, thread, shared):
        if i32(cuda.blockIdx.x) // kv_splits < kv_heads:
            first_split, column, received, partial = i32(0), i32(0), False, False
            while column < columns:
                group = next_group(past.positions, column, first_split)
                if group.split < group.active:
                    attend(io, group, past, not received, thread, shared)
                    received = True
                    partial = partial or group.active > 1
                column, first_split = i32(column + group.count), i32(first_split + group.active)
            if thread == 0:
                timestamp(io.timestamps, io.op, STAGED)
            # After the partial results of all columns: no CTA waits for one that waits for another column.
            first_split, column = i32(0), i32(0)
            while partial and column < columns:
                group = next_group(past.positions, column, first_split)
                combine_splits(io, group, thread)
                column, first_split = i32(column + group.count), i32(first_split + group.active)
        sync_consumers()

    return attend_columns


def _make_next_group(shape: PersistentShape) -> Any:
    """Device function (positions, column, first_split) -> the `Group` that begins with this column.

    Arguments: positions, before the step; first_split, the group's first split, counted over all groups before it.

    It runs in every layer, so it divides by a variable once at most: a column later, a split more has keys where its
    past is longer than those of the column before.
    """
    columns, kv_splits, most, split_keys = (
        shape.columns,
        shape.kv_splits,
        shape.attention_columns,
        make_split_keys(shape),
    )

    @ptx.device_function
    def next_group(positions, column, first_split):
        cta, past = u32(cuda.blockIdx.x), u32(positions + column)
        kv_head, slot = i32(cta // u32(kv_splits)), u32(cta % u32(kv_splits))
        split = i32(u32(slot + u32(kv_splits) - u32(first_split) % u32(kv_splits)) % u32(kv_splits))
        keys, count, active, more_from = u32(split_keys(past)), i32(1), u32(1), i32(column)
        if past > u32(ONE_SPLIT_KEYS):
            active = u32(u32(past + keys - u32(1)) // keys)
        first_active, same = i32(active), active > u32(1)
        while same and count < most and column + count < columns:
            past = u32(past + u32(1))
            same = u32(split_keys(past)) == keys
            if same:
                if past > active * keys:
                    active, more_from = u32(active + u32(1)), i32(column + count)
                count = i32(count + 1)
        return Group(column, count, kv_head, split, i32(keys), first_active, i32(active), more_from)

    return next_group


def _make_receive_tokens(shape: PersistentShape, token_start: int) -> Any:
    """Device function (io, group, with_keys, thread, halves): the group's q of the CTA's heads and, `with_keys`, the
    keys and values of all columns, from the mailbox to shared memory; all loads are issued together.
    """
    head_dim, query_group, pitch, x_start = shape.head_dim, shape.query_group, shape.query_pitch, shape.x_start
    half, columns = head_dim // 2, shape.columns
    q_pitch, kv_pitch = shape.heads * half, shape.kv_heads * half
    q_start, k_start, v_start = shape.mailbox.q, shape.mailbox.k, shape.mailbox.v
    q_loads, kv_loads = query_group * half // 2, half // 2  # of a column, and of its key
    most = shape.attention_columns * q_loads + 2 * columns * kv_loads
    rounds = -(-most // CONSUMER_THREADS)
    registers = 4 * rounds

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
                w0, w1, w2, w3 = ptx.ll_load(mailbox, index)
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

    return receive_tokens


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


def _make_store_out(shape: PersistentShape) -> Any:
    """Device function (io, head, pair, low, high): two elements of a result; head: KV head, counted over columns."""
    start, pairs = shape.mailbox.attn_out, shape.query_group * shape.head_dim // 2

    @ptx.device_function
    def store_out(io, head, pair, low, high):
        ptx.ll_store(io.mailbox, start + head * pairs + pair, ptx.pack_f16x2(low, high), io.flag)

    return store_out


def _make_store_result(shape: PersistentShape, out_start: int, stats_start: int) -> Any:
    """Device function (io, group, floats, thread): combine the partial results of the CTA's warps, in shared
    memory, and store each column's result, or the partial result of its KV split, to the mailbox.
    """
    head_dim, query_group, kv_splits, parts = shape.head_dim, shape.query_group, shape.kv_splits, shape.partial_results
    kv_heads, row_quads, rows = shape.kv_heads, head_dim // 4, shape.attention_rows
    mailbox_partials, mailbox_stats = shape.mailbox.partials, shape.mailbox.softmax_stats
    combine, store_out = make_combine(head_dim, rows, out_start, stats_start), _make_store_out(shape)

    @ptx.large_device_function
    def store_result(io, group, floats, thread):
        entry, split = i32(thread), group.split
        while entry < i32(group.count * query_group * row_quads):
            row, quad = i32(u32(entry) // u32(row_quads)), i32(u32(entry) % u32(row_quads))
            column, head_row = i32(group.first + i32(u32(row) // u32(query_group))), i32(u32(row) % u32(query_group))
            active, d = _active_splits(group, column), i32(4 * quad)
            head = i32(column * kv_heads + group.kv_head)
            if split == 0:  # two constants: the compiler interleaves the sums
                m, row_sum, o0, o1, o2, o3 = combine(floats, parts, row, d)
            else:
                m, row_sum, o0, o1, o2, o3 = combine(floats, CONSUMER_WARPS, row, d)
            if active == 1:
                inverse = _ONE / row_sum
                pair = i32((head_row * row_quads + quad) * 2)
                store_out(io, head, pair, o0 * inverse, o1 * inverse)
                store_out(io, head, pair + 1, o2 * inverse, o3 * inverse)
            elif split < active:
                unit = (head * kv_splits + split) * query_group + head_row
                index = mailbox_partials + unit * head_dim + d
                ptx.ll_store(io.mailbox, index, ptx.f32_bits(o0), io.flag)
                ptx.ll_store(io.mailbox, index + 1, ptx.f32_bits(o1), io.flag)
                ptx.ll_store(io.mailbox, index + 2, ptx.f32_bits(o2), io.flag)
                ptx.ll_store(io.mailbox, index + 3, ptx.f32_bits(o3), io.flag)
                if d == 0:
                    ptx.ll_store(io.mailbox, mailbox_stats + unit * 2, ptx.f32_bits(m), io.flag)
                    ptx.ll_store(io.mailbox, mailbox_stats + unit * 2 + 1, ptx.f32_bits(row_sum), io.flag)
            entry = i32(entry + CONSUMER_THREADS)

    return store_result


def _make_combine_splits(shape: PersistentShape) -> Any:
    """Device function (io, group, thread): the CTA's share of combining the KV splits of the group's
    columns: pairs of elements, each by a team of 16 or 32 lanes, one lane per KV split. A lane receives
    the words of several pairs together.
    """
    head_dim, query_group, kv_splits, kv_heads = shape.head_dim, shape.query_group, shape.kv_splits, shape.kv_heads
    head_words, pairs = head_dim // 2, query_group * head_dim // 2
    partials_start, stats_start = shape.mailbox.partials, shape.mailbox.softmax_stats
    team = 16 if kv_splits <= 16 else 32
    team_max, team_sum = make_team(team)
    store_out, registers, teams = _make_store_out(shape), 8 * _COMBINED, CONSUMER_THREADS // team

    @ptx.device_function
    def split_pair(group, pair):
        """The pair's column, and the pair of that column's heads."""
        column = i32(u32(pair) // u32(pairs))
        return i32(group.first + column), i32(pair - column * pairs)

    @ptx.large_device_function
    def combine_splits(io, group, thread):
        mailbox, flag, split = io.mailbox, io.flag, group.split
        received = cuda.local.array(registers, uint32)
        lane, end = i32(thread % team), i32(group.count * pairs)
        # The splits of the group's first column share the work: all CTAs that have one.
        active = group.first_active
        step = i32(active * teams)
        # All lanes of a warp must take part in the shuffles: a team without a pair repeats the last one.
        warp_pair = i32(split + active * (thread // 32 * (32 // team)))
        team_offset = i32(active * (thread % 32 // team))
        while active > 1 and split < active and warp_pair < end:
            polls, waiting = u32(0), True
            while waiting:
                waiting = False
                for i in range(_COMBINED):
                    pair = min(i32(warp_pair + team_offset + i * step), i32(end - 1))
                    column, head_pair = split_pair(group, pair)
                    head_row = i32(u32(head_pair) // u32(head_words))
                    part = min(lane, i32(_active_splits(group, column) - 1))
                    unit = i32(((column * kv_heads + group.kv_head) * kv_splits + part) * query_group + head_row)
                    d = i32(2 * (head_pair - head_row * head_words))
                    w0, w1, w2, w3 = ptx.ll_load(mailbox, stats_start + unit * 2)
                    received[8 * i], received[8 * i + 1], received[8 * i + 2], received[8 * i + 3] = w0, w1, w2, w3
                    w0, w1, w2, w3 = ptx.ll_load(mailbox, partials_start + unit * head_dim + d)
                    received[8 * i + 4], received[8 * i + 5], received[8 * i + 6], received[8 * i + 7] = w0, w1, w2, w3
                for i in range(4 * _COMBINED):
                    if received[2 * i + 1] != flag:
                        waiting = True
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(io.watchdog, polls):
                    waiting = False
            for i in range(_COMBINED):
                team_pair = i32(warp_pair + team_offset + i * step)
                pair = min(team_pair, i32(end - 1))
                column, head_pair = split_pair(group, pair)
                m, row_sum = ptx.bits_f32(received[8 * i]), ptx.bits_f32(received[8 * i + 2])
                new_max = team_max(m)
                rescale = ptx.exp2(m - new_max) if lane < _active_splits(group, column) else _ZERO
                total = team_sum(row_sum * rescale)
                low = team_sum(ptx.bits_f32(received[8 * i + 4]) * rescale)
                high = team_sum(ptx.bits_f32(received[8 * i + 6]) * rescale)
                if lane == 0 and team_pair < end:
                    store_out(io, i32(column * kv_heads + group.kv_head), head_pair, low / total, high / total)
            warp_pair = i32(warp_pair + _COMBINED * step)

    return combine_splits


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


def _make_attend_group(shape: PersistentShape) -> Any:
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
    receive_tokens = _make_receive_tokens(shape, token_start)
    add_newest = _make_add_newest(shape, token_start, out_start, stats_start, scale)
    multiply_queries = _make_multiply_queries(shape)
    store_result = _make_store_result(shape, out_start, stats_start)
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
        receive_tokens(io, group, with_keys, thread, shared.halves)
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
