"""The persistent kernels' frame: what a CTA does before its warps part into consumers and a producer."""

from typing import Any

from numba import cuda, float32, int64, uint16, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import SPIN_LIMIT, Watchdog
from numba_atomflow.ops.cuda.persistent.pipeline import make_produce
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_THREADS, CTA_THREADS, PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import SharedMemory
from numba_atomflow.ops.cuda.scalars import i32, u32


def make_frame(shape: PersistentShape, consume: Any) -> Any:
    """Kernel (io) of `CTA_THREADS` threads: the schedule's table and the pipeline's barriers, then a producer thread
    beside the consumer warps.

    Args:
        consume: device function (io, shared, thread): what the consumer warps do.
    """
    entries, stages, table_start, full_start = shape.table_entries, shape.stages, shape.table_start, shape.full_start
    produce = make_produce(shape)

    @ptx.kernel(CTA_THREADS, 1)
    def frame(io):
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        halves = cuda.shared.array(0, uint16)
        keys = cuda.shared.array(0, int64)
        barriers = cuda.shared.array(0, uint64)
        thread = i32(cuda.threadIdx.x)
        entry = thread
        while entry < entries:
            words[table_start + entry] = u32(io.table[entry])
            entry += CTA_THREADS
        if thread == 0:
            for barrier in range(2 * stages):  # full and empty
                ptx.barrier_init(barriers, ptx.shared_address(barriers, full_start + barrier), 1)
            ptx.fence_barriers()
        cuda.syncthreads()
        shared = SharedMemory(words, halves, floats, keys, barriers)
        if thread < CONSUMER_THREADS:
            consume(io, shared, thread)
        elif thread == CONSUMER_THREADS:
            limit = cuda.local.array(1, uint32)
            limit[0] = u32(SPIN_LIMIT)
            produce(io, shared, Watchdog(limit, io.fault))

    return frame
