"""Copies of Q, K and V from global memory into the tiles of prefill attention (prefill_plan.py), by `cp.async`.

Why `cp.async` and not TMA: a head's part of a row of the cache is 128 to 256 bytes, far too little for one plain bulk
copy each, and a tensor map would have to be encoded by the driver for K and V of every layer, and would know the
cache's end but not the sequence's: what lies behind the last key would have to be zeroed in shared memory. `cp.async`
writes zeros in place of rows that do not exist, swizzles on the way, and serves every architecture.
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import u32


def make_copy_rows(head_dim: int, tile_rows: int, threads: int) -> Any:
    """Device function (shared, tile, source, start, pitch, first, rows, thread): starts the copies of one head's
    `tile_rows` rows of a row-major array of float16 into a tile. Neither waits nor commits.

    Arguments: tile, the tile's address in shared memory; source, bits of float16; start, element of the head in row 0;
    pitch, elements of a row; first, the first row to copy; rows, how many rows the array has: zeros take the place of
    others; thread, of `threads`. All are int64 except `tile`.
    """
    chunks = head_dim // 8
    row_lanes = 8 if chunks <= 8 else 16  # threads per row: 16 bytes each
    pass_rows = threads // row_lanes
    passes = -(-tile_rows // pass_rows)
    idle_lanes, idle_rows = chunks < row_lanes, tile_rows % pass_rows != 0
    block_bytes = tile_rows * 128

    @ptx.device_function
    def copy_rows(shared, tile, source, start, pitch, first, rows, thread):
        chunk, row_of_pass = thread % row_lanes, thread // row_lanes
        column = tile + chunk // 8 * block_bytes
        if not idle_lanes or chunk < chunks:
            for i in range(passes):
                row = i * pass_rows + row_of_pass
                if not idle_rows or row < tile_rows:
                    place = u32(column + row * 128 + (chunk % 8 ^ row % 8) * 16)
                    exists = first + row < rows
                    index = start + (first + row) * pitch + chunk * 8 if exists else start
                    ptx.copy_async_16(shared, place, source, index, u32(16 if exists else 0))

    return copy_rows
