"""Achievable bandwidth of this GPU's memory: the two ceilings that every figure is compared with.

`make_read` loads 16 bytes a thread, every CTA with a stride of the grid. `make_bulk_read` (sm_90 and later) copies
tiles into shared memory by TMA, through a pipeline of stages per CTA, without reading them there: the highest rate
that memory reaches. Cost model: the bytes, once.
"""

from typing import Any, NamedTuple

from numba import cuda, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import u32

THREADS = 512
UNROLLED = 8  # loads in flight per thread
TILE_WORDS = 2048  # 8 KB: smaller copies are limited by their rate
STAGES = 12  # tiles in flight per CTA
_READ_CTAS = 4  # per SM


class ReadArguments(NamedTuple):
    """The parameter of both kernels.

    Attributes:
        source: what is read; its length is a multiple of 4, or of `tile_words` for the bulk copies.
        total: [1]: a sum over all words is added, or the number of tiles, so that no read is optimised away.
    """

    source: U32
    total: U32


def make_read() -> Any:
    """Kernel (`ReadArguments`): total += the sum of all words.

    Launch: some CTAs of `THREADS` threads per SM, no shared memory.
    """

    @ptx.kernel(THREADS, 2)
    def read(io):
        step = cuda.gridDim.x * THREADS
        quads = len(io.source) // 4
        quad = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        words = cuda.local.array(32, uint32)
        checksum = u32(0)
        while quad < quads:
            for u in range(UNROLLED):
                quad_index = min(quad + u * step, quads - 1)
                w0, w1, w2, w3 = ptx.load_stream_16(io.source, quad_index * 4)
                words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3] = w0, w1, w2, w3
            for u in range(UNROLLED):
                if quad + u * step < quads:
                    for i in range(4):
                        checksum = u32(checksum + words[4 * u + i])
            quad += UNROLLED * step
        checksum = ptx.warp_sum_u32(checksum)
        if cuda.threadIdx.x & 31 == 0:
            cuda.atomic.add(io.total, 0, checksum)

    return read


def read_kernel(sms: int) -> Planned:
    """The spec of the kernel of `make_read`."""
    return Planned(kernel_spec("read", make_read, ReadArguments, THREADS), _READ_CTAS * sms)


def bulk_shared_bytes() -> int:
    """Dynamic shared memory: the tiles, then their barriers."""
    return STAGES * (TILE_WORDS * 4 + 8)


def make_bulk_read(stages: int = STAGES, tile_words: int = TILE_WORDS) -> Any:
    """Kernel (`ReadArguments`): copies every tile; total += their number.

    Launch: one CTA of 32 threads per SM, `bulk_shared_bytes()` of shared memory.
    """
    barriers_start = stages * tile_words // 2  # in words of 8 bytes

    @ptx.kernel(32, 1)
    def bulk_read(io):
        tiles = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(0, uint64)
        if cuda.threadIdx.x == 0:
            first_barrier = ptx.shared_address(barriers, barriers_start)
            for stage in range(stages):
                ptx.barrier_init(barriers, first_barrier + 8 * stage, 1)
            ptx.fence_barriers()
            count = len(io.source) // tile_words
            cta_tiles = (count - cuda.blockIdx.x + cuda.gridDim.x - 1) // cuda.gridDim.x
            for i in range(cta_tiles + stages):
                stage = i % stages
                barrier = first_barrier + 8 * stage
                if i >= stages:
                    ptx.barrier_wait(barriers, barrier, (i // stages - 1) & 1)
                if i < cta_tiles:
                    tile, nbytes = cuda.blockIdx.x + i * cuda.gridDim.x, tile_words * 4
                    ptx.barrier_arrive_expect(barriers, barrier, nbytes)
                    address = ptx.shared_address(tiles, stage * tile_words)
                    ptx.bulk_copy(tiles, address, io.source, tile * tile_words, nbytes, barriers, barrier)
            cuda.atomic.add(io.total, 0, u32(cta_tiles))

    return bulk_read


def bulk_read_kernel(sms: int) -> Planned:
    """The spec of the kernel of `make_bulk_read`."""
    return Planned(kernel_spec("bulk_read", make_bulk_read, ReadArguments, 32, bulk_shared_bytes()), sms)
