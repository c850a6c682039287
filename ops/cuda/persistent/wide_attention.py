"""Attention of the persistent kernel for several columns (tokens at consecutive positions).

Each column is cut into KV splits as a step of one token at its position is, and each split is computed as there, bit
for bit. Columns whose splits have the same bounds are computed together, as many as have 16 rows of query heads: their
keys and values are read once, and a row of the mma is masked behind its own column's past. A context that is one split
needs few keys, and there each column is computed by a CTA of its own. Keys and values of this step's own tokens may not
be in the cache yet, so a CTA receives them with the queries, and takes them from shared memory where a column has them
among its past.
"""

from typing import Any

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import STAGED
from numba_atomflow.ops.cuda.persistent.wide_groups import make_next_group
from numba_atomflow.ops.cuda.persistent.wide_results import make_combine_splits
from numba_atomflow.ops.cuda.persistent.wide_split import make_attend_group
from numba_atomflow.ops.cuda.scalars import i32


def make_attend_columns(shape: PersistentShape, timestamp: Any) -> Any:
    """Device function (io, past, thread, shared): the attention of a layer, of all columns.

    Arguments: io, `ColumnsIo`; past, `LayerPast`; shared, `SharedMemory`.

    Args:
        timestamp: from `trace.make_timestamp`.
    """
    kv_heads, kv_splits, columns = shape.kv_heads, shape.kv_splits, shape.columns
    next_group, attend, combine_splits = make_next_group(shape), make_attend_group(shape), make_combine_splits(shape)

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
