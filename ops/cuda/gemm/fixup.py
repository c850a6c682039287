"""The sums of a tile that several CTAs share (stream-K): each writes its own, and all of them add parts of the tile.

Partial sums lie in `io.partials` in the order of the registers: [slot][fragment][consumer thread][4], so that all
accesses are 16 bytes a thread, side by side. A CTA first writes those of all its shared tiles. When a tile's last part
has arrived, its CTAs divide the fragments (8 tokens of all rows) among them in the order of their arrival: each adds
its slice of the tile in order of K and runs the epilogue on it. Who adds a slice does not matter to the result: the
same bits in every run.

CTAs wait for each other: all of a grid are resident, one or two per SM. The simulator runs them one after the other;
there the last one adds the whole tile.

Two counters per tile: CTAs that have arrived, and CTAs that know that all have. The last of these sets the first back.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import GemmEpilogue, make_stage_barrier
from numba_atomflow.ops.cuda.gemm.plan import SHARED_COUNTERS, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

CONSUMER_BARRIER = 1  # number of the named barrier of the consumer warps; 0 is `syncthreads`
_PARTS, _FRAGMENTS = 4, 4  # that a thread loads before it adds the first: 16 loads of 16 bytes
STATE_WORDS = 2  # how many arrived before this CTA, for each of its shared tiles
_ZERO = f32(0.0)


class Fixup(NamedTuple):
    """Device functions, called by all consumer threads.

    Attributes:
        put: (io, words, state, piece, tile, sums, thread): write this CTA's sums, float32 [tile_elements / threads], of
            its shared tile number `piece`, 0 or 1.
        settle: (io, words, state, stage, number, thread): add slices of all shared tiles of this CTA, which begin at
            work number `number`, and run the epilogue on them. After all calls of `put`.
    """

    put: Any
    settle: Any


def make_fixup(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, threads: int) -> Fixup:
    """For `threads` consumers. `state`: `STATE_WORDS` words of shared memory `words`; `stage`: the epilogue's."""
    sharers, slot_of, work = schedule.sharers, schedule.slot, schedule.work
    tile_elements, units, fragments = plan.tile_elements, plan.units, plan.tile_tokens // 8
    sums_count, sum_slice = tile_elements // threads, _make_sum_slice(plan, epilogue, threads)

    @ptx.large_device_function
    def put(io, words, state, piece, tile, sums, thread):
        index, _, _ = sharers(tile, io.token_tiles)
        own = slot_of(tile, io.token_tiles) * tile_elements + thread * 4
        for j in range(sums_count // 4):
            i = 4 * j
            ptx.store_f32x4(io.partials, own + j * threads * 4, sums[i], sums[i + 1], sums[i + 2], sums[i + 3])
        # All threads wrote, then passed the barrier; one fences for them (fences are cumulative) and counts the CTA.
        ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(threads))
        if thread == 0:
            ptx.fence_gpu()
            words[state + piece] = cuda.atomic.add(io.counters, SHARED_COUNTERS * index, u32(1))

    @ptx.large_device_function
    def settle_tile(io, words, state, piece, stage, tile, thread):
        index, first_slot, count = sharers(tile, io.token_tiles)
        counter, known = i32(SHARED_COUNTERS * index), u32(0)
        if thread == 0:
            while not ptx.SIMULATED and ptx.load_relaxed_u32(io.counters, counter) != u32(count):
                pass
            known = cuda.atomic.inc(io.counters, counter + 1, u32(count - 1))
            ptx.fence_gpu()
        ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(threads))
        first = i32(words[state + piece])
        end = i32(first + 1)
        if ptx.SIMULATED:
            first = i32(0) if end == count else end
        if first < end:
            fragment = i32(u32(first * fragments) // u32(count))
            sum_slice(io, stage, tile, first_slot, count, fragment, i32(u32(end * fragments) // u32(count)), thread)
        if thread == 0 and known == u32(count - 1):
            io.counters[counter] = u32(0)

    @ptx.device_function
    def settle(io, words, state, stage, number, thread):
        piece = i32(0)
        tile, first, last = work(number, io.token_tiles)
        while tile >= 0:
            if last - first < units:
                settle_tile(io, words, state, piece, stage, tile, thread)
                piece = i32(piece + 1)
            number = i32(number + 1)
            tile, first, last = work(number, io.token_tiles)

    return Fixup(put, settle)


def _make_sum_slice(plan: GemmPlan, epilogue: GemmEpilogue, threads: int) -> Any:
    """Device function (io, stage, tile, first_slot, count, first, end, thread): the sums of fragments `first` to
    `end` - 1 of a tile in `count` parts, and the epilogue. After a barrier.
    """
    tile_elements, tile_tokens = plan.tile_elements, plan.tile_tokens
    store, fetch, flush, stage_barrier = epilogue.store, epilogue.fetch, epilogue.flush, make_stage_barrier(epilogue)
    staged, held_count = epilogue.stage_words > 0, max(1, epilogue.held)
    batch = min(_FRAGMENTS, (epilogue.stage_tokens if staged else tile_tokens) // 8)
    loaded_count, sums_count = 4 * _PARTS * batch, 4 * batch

    @ptx.large_device_function
    def store_fragment(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3):
        store(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3)

    @ptx.large_device_function
    def sum_batch(io, first_slot, count, fragment, end, thread, sums):
        """The sums of `batch` fragments from `fragment` on; of those from `end` on it is any others."""
        loaded = cuda.local.array(loaded_count, float32)
        for i in range(sums_count):
            sums[i] = _ZERO
        part = i32(0)
        while part < count:
            for p in range(_PARTS):  # beyond the last part, the last one once more
                slot = first_slot + (part + p if part + p < count else count - 1)
                for j in range(batch):
                    place = fragment + j if fragment + j < end else end - 1
                    i = 4 * (p * batch + j)
                    at = slot * tile_elements + (place * threads + thread) * 4
                    s0, s1, s2, s3 = ptx.load_relaxed_f32x4(io.partials, at)
                    loaded[i], loaded[i + 1], loaded[i + 2], loaded[i + 3] = s0, s1, s2, s3
            for p in range(_PARTS):
                if part + p < count:
                    for i in range(sums_count):
                        sums[i] += loaded[p * sums_count + i]
            part = i32(part + _PARTS)

    @ptx.large_device_function
    def sum_slice(io, stage, tile, first_slot, count, first, end, thread):
        sums, held = cuda.local.array(sums_count, float32), cuda.local.array(held_count, float32)
        row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
        token, prepacked = token_tile * tile_tokens, row_tile * (threads // 32) + (thread >> 5)
        fragment = first
        while fragment < end:
            batch_end = min(i32(fragment + batch), end)
            sum_batch(io, first_slot, count, fragment, end, thread, sums)
            if staged:
                fetch(io, row_tile, token, fragment * 8, batch_end * 8, thread, held)
                stage_barrier(thread)
            for j in range(batch):
                if fragment + j < end:
                    in_stage, i = 8 * j, 4 * j
                    c0, c1, c2, c3 = sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
                    at = token + fragment * 8 + in_stage
                    store_fragment(io, stage, prepacked, thread & 31, at, in_stage, c0, c1, c2, c3)
            if staged:
                stage_barrier(thread)
                flush(io, stage, row_tile, token, fragment * 8, batch_end * 8, thread, held)
            fragment = i32(fragment + batch)

    return sum_slice
