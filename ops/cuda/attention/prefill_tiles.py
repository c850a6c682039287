"""Copies of Q, K and V from global memory into the tiles of prefill attention (prefill_plan.py), by `cp.async`.

Why `cp.async` and not TMA: a head's part of a row of the cache is 128 to 256 bytes, far too little for one plain bulk
copy each, and a tensor map would have to be encoded by the driver for K and V of every layer, and would know the
cache's end but not the sequence's: what lies behind the last key would have to be zeroed in shared memory. `cp.async`
writes zeros in place of rows that do not exist, swizzles on the way, and serves every architecture.
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import i32, u32


def make_copy_rows(head_dim: int, pitch: int, tile_rows: int, threads: int, *, all_exist: bool = False) -> Any:
    """Device function (shared, tile, source, start, first, rows, thread): starts the copies of one head's `tile_rows`
    rows of a row-major array of float16 into a tile. Neither waits nor commits.

    Arguments: tile, the tile's address in shared memory; source, bits of float16; start, element of the head in row 0;
    first, the first row to copy; rows, how many rows the array has: zeros take the place of others; thread, of
    `threads`. `start`, `first` and `rows` are int64.

    Args:
        pitch: elements of a row.
        all_exist: all rows of the tile exist, so that `rows` is not read: a copy takes one instruction.
    """
    chunks = head_dim // 8
    row_shift = 3 if chunks <= 8 else 4 if chunks <= 16 else 5  # 8 to 32 threads per row, of 16 bytes each
    row_lanes = 1 << row_shift
    pass_rows = threads // row_lanes
    passes = -(-tile_rows // pass_rows)
    idle_lanes, idle_rows = chunks < row_lanes, tile_rows % pass_rows != 0
    block_bytes = tile_rows * 128

    @ptx.device_function
    def copy_rows(shared, tile, source, start, first, rows, thread):
        chunk, row_of_pass = thread & (row_lanes - 1), thread >> row_shift
        column = u32(tile + (chunk >> 3) * block_bytes + row_of_pass * 128)
        index = start + (first + row_of_pass) * pitch + chunk * 8
        existing = i32(rows - first - row_of_pass)  # rows, from this thread's first one on
        if not idle_lanes or chunk < chunks:
            for i in range(passes):
                if not idle_rows or i32(i * pass_rows + row_of_pass) < tile_rows:
                    swizzled = ((chunk & 7) ^ ((row_of_pass + i * pass_rows) & 7)) * 16
                    place = u32(column + i * pass_rows * 128 + swizzled)
                    nbytes = u32(16 if all_exist or i32(i * pass_rows) < existing else 0)
                    ptx.copy_async_16(shared, place, source, index + i * pass_rows * pitch, nbytes)

    return copy_rows
