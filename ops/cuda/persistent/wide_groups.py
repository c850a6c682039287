"""Columns of a step whose attention is computed together, and what of it a CTA does."""

from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.schedule import (
    ONE_SPLIT_KEYS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.split_kv import make_split_keys
from numba_atomflow.ops.cuda.scalars import i32, u32


class ColumnsIo(NamedTuple):
    """What the attention of all columns reads and writes.

    Attributes:
        mailbox, timestamps: as in `WideArguments`. vectors: `LayerVectors`. op: its number.
        flag: of the layer's results. watchdog: `Watchdog`. heads: of `heads.make_heads_of`.
    """

    mailbox: Any
    vectors: Any
    timestamps: Any
    op: Any
    flag: Any
    watchdog: Any
    heads: Any


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
def active_splits(group, column):
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


def make_next_group(shape: PersistentShape) -> Any:
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
