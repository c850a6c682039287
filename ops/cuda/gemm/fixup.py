"""The sums of a tile that several CTAs share (stream-K): each writes its own, and all of them add parts of the tile.

Partial sums lie in `io.partials` in the order of the registers: [slot][fragment][consumer thread][4], so that all
accesses are 16 bytes a thread, side by side. A CTA first writes those of all its shared tiles. Then the CTAs of a tile
divide its fragments (8 tokens of all rows) among them in their order along K: each adds its slice of the tile in order
of K and runs the epilogue on it.

A number says by itself that it has been written: `partials` is 0 before a launch, a sum that is 0 is written as -0, and
the only thread that reads a number sets it back to 0. So what one CTA tells another takes one trip through L2, without
fences, barriers or counters.

CTAs wait for each other: all of a grid are resident, one or two per SM. The simulator runs them one after the other;
there the last one adds the whole tile.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import GemmEpilogue, make_stage_barrier
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_PARTS, _FRAGMENTS = 4, 4  # that a thread loads before it adds the first: 16 loads of 16 bytes
_MMA_FRAGMENTS = 2  # with `mma.sync`: two CTAs on an SM have 128 registers for each thread
_POLLED_TOKENS = 64  # of a tile, up to which all of a batch is polled; of larger ones it would be too much
_POLL_NANOSECONDS = 64  # between two looks at what has not been written yet
_ZERO, _MINUS_ZERO, _ONES = f32(0.0), u32(0x80000000), u32(0xFFFFFFFF)  # the last two: bits


class Fixup(NamedTuple):
    """Device functions, called by all consumer threads.

    Attributes:
        put: (io, tile, sums, thread): write this CTA's sums, float32 [tile_elements / threads], of a shared tile.
        settle: (io, stage, number, thread): add slices of all shared tiles of this CTA, which begin at work
            number `number`, and run the epilogue on them. After all calls of `put`.
    """

    put: Any
    settle: Any


@ptx.device_function
def _not_zero(value):
    """The same number with other bits than 0."""
    bits = ptx.f32_bits(value)
    return ptx.bits_f32(_MINUS_ZERO if bits == u32(0) else bits)


def make_fixup(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, threads: int) -> Fixup:
    """For `threads` consumers. `stage`: the epilogue's."""
    sharers, slot_of, work = schedule.sharers, schedule.slot, schedule.work
    tile_elements, units, fragments = plan.tile_elements, plan.units, plan.tile_tokens // 8
    sums_count, sum_slice = tile_elements // threads, _make_sum_slice(plan, epilogue, threads)

    @ptx.large_device_function
    def put(io, tile, sums, thread):
        own = slot_of(tile, io.token_tiles) * tile_elements + thread * 4
        for j in range(sums_count // 4):
            i = 4 * j
            s0, s1 = _not_zero(sums[i]), _not_zero(sums[i + 1])
            s2, s3 = _not_zero(sums[i + 2]), _not_zero(sums[i + 3])
            ptx.store_relaxed_f32x4(io.partials, own + j * threads * 4, s0, s1, s2, s3)

    @ptx.large_device_function
    def settle_tile(io, stage, tile, thread):
        first_slot, count = sharers(tile, io.token_tiles)
        first = i32(slot_of(tile, io.token_tiles) - first_slot)
        end = i32(first + 1)
        if ptx.SIMULATED:
            first = i32(0) if end == count else end
        fragment, last = i32(u32(first * fragments) // u32(count)), i32(u32(end * fragments) // u32(count))
        if fragment < last:  # of more CTAs than fragments, some have none
            sum_slice(io, stage, tile, first_slot, count, fragment, last, thread)

    @ptx.device_function
    def settle(io, stage, number, thread):
        tile, first, last = work(number, io.token_tiles)
        while tile >= 0:
            if last - first < units:
                settle_tile(io, stage, tile, thread)
            number = i32(number + 1)
            tile, first, last = work(number, io.token_tiles)

    return Fixup(put, settle)


def _make_sum_slice(plan: GemmPlan, epilogue: GemmEpilogue, threads: int) -> Any:
    """Device function (io, stage, tile, first_slot, count, first, end, thread): the sums of fragments `first` to
    `end` - 1 of a tile in `count` parts, and the epilogue.
    """
    tile_elements, tile_tokens = plan.tile_elements, plan.tile_tokens
    store, fetch, flush, stage_barrier = epilogue.store, epilogue.fetch, epilogue.flush, make_stage_barrier(epilogue)
    staged, held_count = epilogue.stage_words > 0, max(1, epilogue.held)
    wgmma = plan.instructions == "wgmma"
    batch = min(_FRAGMENTS if wgmma else _MMA_FRAGMENTS, (epilogue.stage_tokens if staged else tile_tokens) // 8)
    loaded_count, sums_count = 4 * _PARTS * batch, 4 * batch
    # The kernel with `mma.sync` has no registers for it beside those of 128 tokens.
    polls_first = tile_tokens > _POLLED_TOKENS and wgmma

    @ptx.large_device_function
    def store_fragment(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3):
        store(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3)

    @ptx.large_device_function
    def is_written(io, first_slot, count, part, fragment, thread):
        """Whether this thread's first sum of a fragment is, in `_PARTS` parts."""
        least = _ONES
        for p in range(_PARTS):
            slot = first_slot + (part + p if part + p < count else count - 1)
            at = slot * tile_elements + (fragment * threads + thread) * 4
            least = min(least, ptx.f32_bits(ptx.load_relaxed_f32(io.partials, at)))
        return u32(1) if least != u32(0) else u32(0)

    @ptx.large_device_function
    def load_batch(io, first_slot, count, part, fragment, end, thread, loaded):
        """1 if all are written of `_PARTS` parts and `batch` fragments, else 0. Beyond the last, the last once more."""
        least = _ONES
        for p in range(_PARTS):
            slot = first_slot + (part + p if part + p < count else count - 1)
            for j in range(batch):
                place = fragment + j if fragment + j < end else end - 1
                i = 4 * (p * batch + j)
                at = slot * tile_elements + (place * threads + thread) * 4
                s0, s1, s2, s3 = ptx.load_relaxed_f32x4(io.partials, at)
                loaded[i], loaded[i + 1], loaded[i + 2], loaded[i + 3] = s0, s1, s2, s3
        for i in range(loaded_count):
            least = min(least, ptx.f32_bits(loaded[i]))
        return u32(1) if least != u32(0) else u32(0)

    @ptx.large_device_function
    def clear_batch(io, first_slot, count, part, fragment, end, thread):
        for p in range(_PARTS):
            slot = first_slot + (part + p if part + p < count else count - 1)
            for j in range(batch):
                place = fragment + j if fragment + j < end else end - 1
                at = slot * tile_elements + (place * threads + thread) * 4
                ptx.store_relaxed_f32x4(io.partials, at, _ZERO, _ZERO, _ZERO, _ZERO)

    @ptx.large_device_function
    def sum_batch(io, first_slot, count, fragment, end, thread, sums):
        """The sums of `batch` fragments from `fragment` on; of those from `end` on it is any others."""
        loaded = cuda.local.array(loaded_count, float32)
        for i in range(sums_count):
            sums[i] = _ZERO
        part = i32(0)
        while part < count:
            while load_batch(io, first_slot, count, part, fragment, end, thread, loaded) == u32(0):
                ptx.nanosleep(u32(_POLL_NANOSECONDS))
            clear_batch(io, first_slot, count, part, fragment, end, thread)
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
        if polls_first:
            part = i32(0)
            while part < count:
                while is_written(io, first_slot, count, part, i32(end - 1), thread) == u32(0):
                    ptx.nanosleep(u32(_POLL_NANOSECONDS))
                part = i32(part + _PARTS)
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
