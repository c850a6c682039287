"""Results of the attention of several columns: of one KV split, or combined from several, for all CTAs."""

from typing import Any

import numpy as np
from numba import cuda, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.combine import make_combine
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.split_kv import make_team
from numba_atomflow.ops.cuda.persistent.wide_groups import active_splits
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_COMBINED = 4  # pairs of elements whose partial results a thread receives at once


def make_store_out(shape: PersistentShape) -> Any:
    """Device function (io, column, head, pair, low, high): two elements of a result; head: KV head, counted over
    columns.
    """
    pairs, own_pairs, exchange = (
        shape.query_group * shape.head_dim // 2,
        shape.heads * shape.head_dim // 2,
        make_exchange(shape.ranks),
    )
    store_vector, of_columns = exchange.store_vector, exchange.of_columns

    @ptx.device_function
    def store_out(io, column, head, pair, low, high):
        vectors = io.vectors
        word = of_columns(vectors.words, vectors.start + head * pairs + pair, column, own_pairs)
        store_vector(vectors.words, word, ptx.pack_f16x2(low, high))

    return store_out


def make_store_result(shape: PersistentShape, out_start: int, stats_start: int) -> Any:
    """Device function (io, group, floats, thread): combine the partial results of the CTA's warps, in shared
    memory, and store each column's result, or the partial result of its KV split, to the mailbox.
    """
    head_dim, query_group, kv_splits, parts = shape.head_dim, shape.query_group, shape.kv_splits, shape.partial_results
    kv_heads, row_quads, rows = shape.kv_heads, head_dim // 4, shape.attention_rows
    mailbox_partials, mailbox_stats = shape.mailbox.partials, shape.mailbox.softmax_stats
    combine, store_out = make_combine(head_dim, rows, out_start, stats_start), make_store_out(shape)
    publish = make_exchange(shape.ranks).store_own

    @ptx.large_device_function
    def store_result(io, group, floats, thread):
        entry, split = i32(thread), group.split
        while entry < i32(group.count * query_group * row_quads):
            row, quad = i32(u32(entry) // u32(row_quads)), i32(u32(entry) % u32(row_quads))
            column, head_row = i32(group.first + i32(u32(row) // u32(query_group))), i32(u32(row) % u32(query_group))
            active, d = active_splits(group, column), i32(4 * quad)
            head = i32(column * kv_heads + group.kv_head)
            if split == 0:  # two constants: the compiler interleaves the sums
                m, row_sum, o0, o1, o2, o3 = combine(floats, parts, row, d)
            else:
                m, row_sum, o0, o1, o2, o3 = combine(floats, CONSUMER_WARPS, row, d)
            if active == 1:
                inverse = _ONE / row_sum
                pair = i32((head_row * row_quads + quad) * 2)
                store_out(io, column, head, pair, o0 * inverse, o1 * inverse)
                store_out(io, column, head, pair + 1, o2 * inverse, o3 * inverse)
            elif split < active:
                unit = (head * kv_splits + split) * query_group + head_row
                index = mailbox_partials + unit * head_dim + d
                publish(io.mailbox, index, ptx.f32_bits(o0), io.flag)
                publish(io.mailbox, index + 1, ptx.f32_bits(o1), io.flag)
                publish(io.mailbox, index + 2, ptx.f32_bits(o2), io.flag)
                publish(io.mailbox, index + 3, ptx.f32_bits(o3), io.flag)
                if d == 0:
                    publish(io.mailbox, mailbox_stats + unit * 2, ptx.f32_bits(m), io.flag)
                    publish(io.mailbox, mailbox_stats + unit * 2 + 1, ptx.f32_bits(row_sum), io.flag)
            entry = i32(entry + CONSUMER_THREADS)

    return store_result


def make_combine_splits(shape: PersistentShape) -> Any:
    """Device function (io, group, thread): the CTA's share of combining the KV splits of the group's
    columns: pairs of elements, each by a team of 16 or 32 lanes, one lane per KV split. A lane receives
    the words of several pairs together.
    """
    head_dim, query_group, kv_splits, kv_heads = shape.head_dim, shape.query_group, shape.kv_splits, shape.kv_heads
    head_words, pairs = head_dim // 2, query_group * head_dim // 2
    partials_start, stats_start = shape.mailbox.partials, shape.mailbox.softmax_stats
    team = 16 if kv_splits <= 16 else 32
    team_max, team_sum = make_team(team)
    store_out, registers, teams = make_store_out(shape), 8 * _COMBINED, CONSUMER_THREADS // team
    load = make_exchange(shape.ranks).load_own

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
                    part = min(lane, i32(active_splits(group, column) - 1))
                    unit = i32(((column * kv_heads + group.kv_head) * kv_splits + part) * query_group + head_row)
                    d = i32(2 * (head_pair - head_row * head_words))
                    w0, w1, w2, w3 = load(mailbox, stats_start + unit * 2)
                    received[8 * i], received[8 * i + 1], received[8 * i + 2], received[8 * i + 3] = w0, w1, w2, w3
                    w0, w1, w2, w3 = load(mailbox, partials_start + unit * head_dim + d)
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
                rescale = ptx.exp2(m - new_max) if lane < active_splits(group, column) else _ZERO
                total = team_sum(row_sum * rescale)
                low = team_sum(ptx.bits_f32(received[8 * i + 4]) * rescale)
                high = team_sum(ptx.bits_f32(received[8 * i + 6]) * rescale)
                if lane == 0 and team_pair < end:
                    head = i32(column * kv_heads + group.kv_head)
                    store_out(io, column, head, head_pair, low / total, high / total)
            warp_pair = i32(warp_pair + _COMBINED * step)

    return combine_splits
