"""The sums of a tile that several CTAs share (stream-K): each writes its own, the last to finish adds them all.

Partial sums lie in `io.partials` in the order of the registers: [slot][4 accumulators' index][consumer thread][4], so
that all accesses are 16 bytes a thread, side by side. They are added in order of K, whichever CTA comes last: the same
result in every run.
"""

import math
from typing import Any

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import SHARED_SM_TOKENS, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

CONSUMER_BARRIER = 1  # number of the named barrier of the consumer warps; 0 is `syncthreads`
_VECTORS_IN_FLIGHT = 16  # 16-byte loads of a thread, where there are registers: half as many
_MEDIUM = 192  # tokens of a tile, beyond which there are fewer
_ZERO = f32(0.0)


def make_fixup(plan: GemmPlan, schedule: Schedule, threads: int) -> Any:
    """Device function (io, words, flag, tile, sums, thread) -> whether `sums` now holds the sums of the whole tile; if
    not, another CTA will have them. By all consumer threads.

    `threads`: consumers; `flag`: a word of shared memory `words`; sums: float32 [tile_elements / threads].
    """
    sharers, slot_of, tile_elements = schedule.sharers, schedule.slot, plan.tile_elements
    sums_count = tile_elements // threads
    # A thread loads `vectors` of each of `parts` parts before it adds the first; `batches` times, to have all.
    in_flight = _VECTORS_IN_FLIGHT if SHARED_SM_TOKENS < plan.tile_tokens <= _MEDIUM else _VECTORS_IN_FLIGHT // 2
    vectors = math.gcd(sums_count // 4, in_flight)
    parts, batches = in_flight // vectors, sums_count // 4 // vectors
    registers = parts * vectors * 4

    @ptx.large_device_function
    def fixup(io, words, flag, tile, sums, thread):
        loaded = cuda.local.array(registers, float32)
        counter, first_slot, count = sharers(tile, io.token_tiles)
        own = slot_of(tile, io.token_tiles) * tile_elements + thread * 4
        for j in range(sums_count // 4):
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
            for i in range(sums_count):
                sums[i] = _ZERO
            part = i32(0)
            while part < count:
                for batch in range(batches):
                    for p in range(parts):  # beyond the last part, the last one once more
                        slot = first_slot + (part + p if part + p < count else count - 1)
                        start = slot * tile_elements + thread * 4 + batch * vectors * threads * 4
                        for j in range(vectors):
                            i = (p * vectors + j) * 4
                            s0, s1, s2, s3 = ptx.load_relaxed_f32x4(io.partials, start + j * threads * 4)
                            loaded[i], loaded[i + 1], loaded[i + 2], loaded[i + 3] = s0, s1, s2, s3
                    for p in range(parts):
                        if part + p < count:
                            for i in range(4 * vectors):
                                sums[batch * vectors * 4 + i] += loaded[p * vectors * 4 + i]
                part = i32(part + parts)
        return is_last

    return fixup
