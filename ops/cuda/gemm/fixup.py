"""The sums of a tile that several CTAs share (stream-K): each writes its own, the last to finish adds them all.

Partial sums lie in `io.partials` in the order of the registers: [slot][4 accumulators' index][consumer thread][4], so
that all accesses are 16 bytes a thread, side by side. They are added in order of K, whichever CTA comes last: the same
result in every run.
"""

from typing import Any

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

CONSUMER_BARRIER = 1  # number of the named barrier of the consumer warps; 0 is `syncthreads`
_ZERO = f32(0.0)


def make_fixup(plan: GemmPlan, schedule: Schedule, threads: int) -> Any:
    """Device function (io, words, flag, tile, sums, thread) -> whether `sums` now holds the sums of the whole tile; if
    not, another CTA will have them. By all consumer threads.

    `threads`: consumers; `flag`: a word of shared memory `words`; sums: float32 [tile_elements / threads].
    """
    sharers, slot_of, tile_elements = schedule.sharers, schedule.slot, plan.tile_elements
    vectors = tile_elements // threads // 4

    @ptx.large_device_function
    def fixup(io, words, flag, tile, sums, thread):
        counter, first_slot, count = sharers(tile, io.token_tiles)
        own = slot_of(tile, io.token_tiles) * tile_elements + thread * 4
        for j in range(vectors):
            i = 4 * j
            ptx.store_f32x4(io.partials, own + j * threads * 4, sums[i], sums[i + 1], sums[i + 2], sums[i + 3])
        # All threads wrote, then passed the barrier; one fences for them (fences are cumulative) and counts the CTA.
        # Who counts last fences again before all read.
        ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(threads))
        if thread == 0:
            ptx.fence_gpu()
            words[flag] = cuda.atomic.inc(io.counters, counter, u32(count - 1))
            ptx.fence_gpu()
        ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(threads))
        is_last = words[flag] == u32(count - 1)
        if is_last:
            for i in range(4 * vectors):
                sums[i] = _ZERO
            part = i32(0)
            while part < count:
                start = (first_slot + part) * tile_elements + thread * 4
                for j in range(vectors):
                    i = 4 * j
                    s0, s1, s2, s3 = ptx.load_relaxed_f32x4(io.partials, start + j * threads * 4)
                    sums[i] += s0
                    sums[i + 1] += s1
                    sums[i + 2] += s2
                    sums[i + 3] += s3
                part = i32(part + 1)
        return is_last

    return fixup
