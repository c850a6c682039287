"""Split-KV in the persistent kernel: which CTA takes which split of the sequence, and how the splits are combined.

The CTAs that computed the splits also combine them: each takes a share of the result's elements, one lane per split.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CTA_KEYS,
    ONE_SPLIT_KEYS,
    WARP_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.scalars import i32, u32

_ZERO = np.float32(0.0)


class KvSplit(NamedTuple):
    """A CTA's part of attention.

    Attributes:
        kv_head: its KV head; out of range for a CTA without work. split: its number among the splits of the sequence.
        keys: per split. active: splits with keys.
    """

    kv_head: Any
    split: Any
    keys: Any
    active: Any


class AttentionIo(NamedTuple):
    """What attention reads and writes beside the cache.

    Attributes:
        mailbox, attn_out, timestamps: as in `PersistentArguments`. op: its number. flag: of the layer's results.
        watchdog: `Watchdog`.
        heads: of `heads.make_heads_of`.
    """

    mailbox: Any
    attn_out: Any
    timestamps: Any
    op: Any
    flag: Any
    watchdog: Any
    heads: Any


def make_split_keys(shape: PersistentShape) -> Any:
    """Device function (position) -> keys of a KV split."""
    kv_splits = shape.kv_splits

    @ptx.device_function
    def split_keys(position):
        keys = ((position + kv_splits - 1) // kv_splits + WARP_KEYS - 1) // WARP_KEYS * WARP_KEYS
        return max(keys, ONE_SPLIT_KEYS if position <= ONE_SPLIT_KEYS else CTA_KEYS)

    return split_keys


def make_kv_split(shape: PersistentShape) -> Any:
    """Device function (position) -> the CTA's `KvSplit`."""
    kv_splits, split_keys = shape.kv_splits, make_split_keys(shape)

    @ptx.device_function
    def kv_split(position):
        keys = split_keys(position)
        active = max((position + keys - 1) // keys, 1)
        cta = i32(cuda.blockIdx.x)
        return KvSplit(i32(cta // kv_splits), i32(cta % kv_splits), i32(keys), i32(active))

    return kv_split


def make_team(lanes: int) -> tuple[Any, Any]:
    """Device functions (x) -> the maximum, and the sum, of x over a team of `lanes` adjacent lanes, a power of two."""
    steps = lanes.bit_length() - 1

    @ptx.device_function
    def team_max(x):
        for step in range(steps):
            x = max(x, ptx.shuffle_xor_f32(x, lanes // 2 >> step))
        return x

    @ptx.device_function
    def team_sum(x):
        for step in range(steps):
            x += ptx.shuffle_xor_f32(x, lanes // 2 >> step)
        return x

    return team_max, team_sum


def make_poll(load: Any = ptx.ll_load) -> tuple[Any, Any]:
    """Device functions (io, index, out) and (io, index, other, out): poll two words of the mailbox from `index` on, or
    two each from two places, whose loads are issued together.

    Args:
        load: device function (mailbox, index) -> two words.
    """

    @ptx.large_device_function
    def poll(io, index, out):
        mailbox, flag, polls = io.mailbox, io.flag, u32(0)
        waiting = True
        while waiting:
            w0, flag0, w1, flag1 = load(mailbox, index)
            out[0], out[1] = w0, w1
            polls = u32(polls + u32(1))
            waiting = flag0 != flag or flag1 != flag
            if waiting and watchdog_trips(io.watchdog, polls):
                waiting = False

    @ptx.device_function
    def poll_both(io, index, other, out):
        mailbox, flag, polls = io.mailbox, io.flag, u32(0)
        waiting = True
        while waiting:
            w0, flag0, w1, flag1 = load(mailbox, index)
            w2, flag2, w3, flag3 = load(mailbox, other)
            out[0], out[1], out[2], out[3] = w0, w1, w2, w3
            polls = u32(polls + u32(1))
            waiting = flag0 != flag or flag1 != flag or flag2 != flag or flag3 != flag
            if waiting and watchdog_trips(io.watchdog, polls):
                waiting = False

    return poll, poll_both


def make_store_out(shape: PersistentShape) -> Any:
    """Device function (io, kv_head, pair, low, high): two elements of the result."""
    start, pairs = shape.mailbox.attn_out, shape.query_group * shape.head_dim // 2
    own_words, exchange = shape.kv_heads * pairs, make_exchange(shape.ranks)
    publish, of_model = exchange.store, exchange.of_model

    @ptx.device_function
    def store_out(io, kv_head, pair, low, high):
        word = ptx.pack_f16x2(low, high)
        publish(io.mailbox, of_model(io.mailbox, start + kv_head * pairs + pair, own_words), word, io.flag)
        io.attn_out[kv_head * pairs + pair] = word

    return store_out


def make_combine_splits(shape: PersistentShape, poll_both: Any, store_out: Any) -> Any:
    """Device function (io, cta_split, thread): the CTA's share of combining the KV splits: every `active`-th pair of
    elements, each by a team of 16 or 32 lanes, one lane per KV split.
    """
    head_dim, query_group, kv_splits = shape.head_dim, shape.query_group, shape.kv_splits
    head_words, pairs = head_dim // 2, query_group * head_dim // 2
    partials_start, stats_start = shape.mailbox.partials, shape.mailbox.softmax_stats
    team = 16 if kv_splits <= 16 else 32
    team_max, team_sum = make_team(team)

    @ptx.large_device_function
    def combine_splits(io, cta_split, thread):
        kv_head, active = cta_split.kv_head, cta_split.active
        received = cuda.local.array(4, uint32)
        lane = thread % team
        split = min(lane, i32(active - 1))
        warp_pair = cta_split.split + active * (thread // 32 * (32 // team))  # of the warp's first team
        while warp_pair < pairs:
            # All lanes of a warp must take part in the shuffles: a team without a pair repeats the last one.
            team_pair = warp_pair + active * (thread % 32 // team)
            pair = min(team_pair, pairs - 1)
            row, d = pair // head_words, pair % head_words * 2
            unit = (kv_head * kv_splits + split) * query_group + row
            poll_both(io, stats_start + unit * 2, partials_start + unit * head_dim + d, received)
            m, row_sum = ptx.bits_f32(received[0]), ptx.bits_f32(received[1])
            new_max = team_max(m)
            rescale = ptx.exp2(m - new_max) if lane < active else _ZERO
            total = team_sum(row_sum * rescale)
            low = team_sum(ptx.bits_f32(received[2]) * rescale)
            high = team_sum(ptx.bits_f32(received[3]) * rescale)
            if lane == 0 and team_pair < pairs:
                store_out(io, kv_head, pair, low / total, high / total)
            warp_pair += active * (CONSUMER_THREADS // team)

    return combine_splits
