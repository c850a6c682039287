"""How fast this GPU's memory can be read: the two ceilings that every figure is compared with.

`make_read` loads 16 bytes a thread, every block striding over the whole. `make_bulk_read` (sm_90 and later) lets the
copy engine bring tiles into shared memory, a ring of them per block, with nobody looking at what arrives: as fast as
memory gives. Cost model: the bytes, once.
"""

from typing import Any

import numpy as np
from numba import cuda, uint32, uint64

from numba_atomflow.ops import ptx

THREADS = 512
UNROLLED = 8  # loads that a thread has in flight
TILE_WORDS = 2048  # 8 KB: smaller copies are limited by their number
STAGES = 12  # tiles in flight per block


def make_read() -> Any:
    """Kernel (source uint32 [a multiple of 4], total uint32 [1]): total += a sum over all words, as a proof of reading.

    Launch: some blocks of `THREADS` threads per multiprocessor, no shared memory.
    """

    @ptx.kernel(THREADS, 2)
    def read(source, total):
        step = cuda.gridDim.x * THREADS
        quads = len(source) // 4
        quad = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        words = cuda.local.array(32, uint32)
        found = np.uint32(0)
        while quad < quads:
            for u in range(UNROLLED):
                at = min(quad + u * step, quads - 1)
                w0, w1, w2, w3 = ptx.load_stream_16(source, at * 4)
                words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3] = w0, w1, w2, w3
            for u in range(UNROLLED):
                if quad + u * step < quads:
                    for i in range(4):
                        found = np.uint32(found + words[4 * u + i])
            quad += UNROLLED * step
        for lanes in range(5):
            found = np.uint32(found + ptx.shuffle_xor_u32(found, 16 >> lanes))
        if cuda.threadIdx.x & 31 == 0:
            cuda.atomic.add(total, 0, found)

    return read


def bulk_shared_bytes() -> int:
    """Dynamic shared memory: the tiles, then their barriers."""
    return STAGES * (TILE_WORDS * 4 + 8)


def make_bulk_read(stages: int = STAGES, tile_words: int = TILE_WORDS) -> Any:
    """Kernel (source uint32 [a multiple of `tile_words`], total uint32 [1]): copies every tile; total counts them.

    Launch: one block of 32 threads per multiprocessor, `bulk_shared_bytes()` of shared memory.
    """
    barriers_start = stages * tile_words // 2  # in words of 8 bytes

    @ptx.kernel(32, 1)
    def bulk_read(source, total):
        tiles = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(0, uint64)
        if cuda.threadIdx.x == 0:
            first_barrier = ptx.shared_address(barriers, barriers_start)
            for stage in range(stages):
                ptx.barrier_init(barriers, first_barrier + 8 * stage, 1)
            ptx.fence_barriers()
            count = len(source) // tile_words
            own = (count - cuda.blockIdx.x + cuda.gridDim.x - 1) // cuda.gridDim.x
            for i in range(own + stages):
                stage = i % stages
                barrier = first_barrier + 8 * stage
                if i >= stages:
                    ptx.barrier_wait(barriers, barrier, (i // stages - 1) & 1)
                if i < own:
                    tile, nbytes = cuda.blockIdx.x + i * cuda.gridDim.x, tile_words * 4
                    ptx.barrier_arrive_expect(barriers, barrier, nbytes)
                    at = ptx.shared_address(tiles, stage * tile_words)
                    ptx.bulk_copy(tiles, at, source, tile * tile_words, nbytes, barriers, barrier)
            cuda.atomic.add(total, 0, np.uint32(own))

    return bulk_read
