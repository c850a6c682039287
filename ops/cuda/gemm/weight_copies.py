"""FP8 weights of a `wgmma` main loop, copied by the three warps of the producer's warpgroup that do not copy X.

A slot of shared memory holds a unit (128 of K) of the eight prepacked tiles of a CTA: of each its codes as they are in
memory, then its 16 scales. The warps copy with `cp.async`: pieces of 512 bytes, of which bulk copies would take 70 ns
each. They begin before the previous kernel has ended, since weights do not depend on it, and run on from one tile to
the next. `full` completes a phase when the bytes have arrived, `empty` when all consumer warps have read them.

With FP8 activations a slot belongs to a stage of the pipeline of X, and has its barriers. With float16 activations, and
tiles of `plan.COPIED_FROM` tokens and more, slots have barriers of their own, because consumers read a unit ahead: they
need its codes before its X. A consumer that copies for itself (`ring.py`) executes some 245 instructions for a unit in
place of 210: copies by other warps save 3 to 7 % of a unit's time (docs/prompts.md).
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import CONSUMER_WARPS
from numba_atomflow.ops.cuda.gemm.plan import FP8_SLOT_WORDS, FP8_TILE_WORDS, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.gemm.weights import WeightSource
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, PrepackedLayout, make_offsets
from numba_atomflow.ops.cuda.scalars import i32, u32

COPY_THREADS = 96  # of the producer's warpgroup
_PIECES, _PIECE_WORDS = 4, 128  # of a unit's codes: 16 bytes of each lane of a warp
_SLOT, _PHASE, _CURSOR_WORDS = range(3)  # of a consumer's cursor: the slot that is read next and its phase's parity


def make_copy_weights(plan: GemmPlan, schedule: Schedule, shared: Any) -> Any:
    """Device function (io, words, barriers, shared_start, full, empty, thread): what `COPY_THREADS` threads do.

    They copy the weights of every unit: two warps the codes, four prepacked tiles each; one warp the scales of all.
    `shared_start`, `full`, `empty`: addresses of shared memory and of the slots' barriers.

    Args:
        shared: `wgmma.Shared`.
    """
    work, layout, reads_ahead = schedule.work, plan.layout, plan.copies_weights
    codes_at, scale_at = make_offsets(layout)
    tiles, tile_words, slots = layout.tiles, layout.tile_words, plan.ring if plan.copies_weights else plan.stages
    weights_at, slot_bytes, tile_bytes = 4 * shared.weights, 4 * FP8_SLOT_WORDS, 4 * FP8_TILE_WORDS
    whole = tiles % CONSUMER_WARPS == 0
    chunk_rows = 4 if layout.split_rows else 2  # from 16 bytes of scales to the next

    @ptx.device_function
    def nbytes(prepacked):
        """Of a copy: none of a tile beyond the last, for which zeros are written."""
        return u32(16) if whole or prepacked < tiles else u32(0)

    @ptx.large_device_function
    def copy_codes(io, words, target, first, unit, lane):
        """Of four prepacked tiles from `first` on."""
        place, start = u32(target + u32(lane * 16)), first * tile_words + lane * 4
        for tile in range(4):
            for piece in range(_PIECES):
                at = start + tile * tile_words + codes_at(unit, piece // 2, piece % 2)
                copied = u32(place + u32(tile * tile_bytes + piece * (4 * _PIECE_WORDS)))
                ptx.copy_async_16(words, copied, io.weights, at, nbytes(first + tile))

    @ptx.large_device_function
    def copy_scales(io, words, target, first, unit, lane):
        """Of eight prepacked tiles."""
        tile, chunk = lane >> 2, lane & 3
        place = u32(target + u32(tile * tile_bytes) + u32(4 * GROUP_WORDS) + u32(chunk * 16))
        at = (first + tile) * tile_words + scale_at(unit, chunk * chunk_rows)
        ptx.copy_async_16(words, place, io.weights, at, nbytes(first + tile))

    @ptx.device_function
    def copy_weights(io, words, barriers, shared_start, full, empty, thread):
        lane, warp = i32(thread & 31), i32(thread >> 5)
        slot, phase, number = i32(0), u32(0), i32(0)
        tile, first, last = work(number, io.token_tiles)
        while tile >= 0:
            prepacked = i32(i32(u32(tile) // u32(io.token_tiles)) * CONSUMER_WARPS)
            for unit in range(first, last):
                ptx.barrier_wait(barriers, u32(empty + u32(8) * u32(slot)), u32(phase ^ u32(1)))
                target = u32(shared_start + u32(weights_at) + u32(slot) * u32(slot_bytes))
                if warp < 2:
                    target = u32(target + u32(warp * (4 * tile_bytes)))
                    copy_codes(io, words, target, i32(prepacked + warp * 4), unit, lane)
                else:
                    copy_scales(io, words, target, prepacked, unit, lane)
                ptx.barrier_arrive_on_copies(barriers, u32(full + u32(8) * u32(slot)))
                slot = i32(slot + 1)
                if slot == slots:
                    slot, phase = i32(0), u32(phase ^ u32(1))
            number = i32(number + 1)
            tile, first, last = work(number, io.token_tiles)
        if reads_ahead:  # while its last unit is multiplied a consumer waits for one more, of which it uses nothing
            ptx.barrier_wait(barriers, u32(empty + u32(8) * u32(slot)), u32(phase ^ u32(1)))
            ptx.barrier_arrive_on_copies(barriers, u32(full + u32(8) * u32(slot)))

    return copy_weights


def make_read_scales(layout: PrepackedLayout) -> Any:
    """Device function (words, at, lane) -> scales of rows g and g + 8 of a prepacked tile that begins at word `at`."""
    split = layout.split_rows

    @ptx.device_function
    def read_scales(words, at, lane):
        row = at + GROUP_WORDS + (lane >> 2)
        if split:
            return ptx.bits_f32(words[u32(row)]), ptx.bits_f32(words[u32(row + 8)])
        low, high = ptx.load_8(words, row + (lane >> 2))  # the scales of rows g and g + 8 are neighbours
        return ptx.bits_f32(low), ptx.bits_f32(high)

    return read_scales


def make_copied_weights(plan: GemmPlan, shared: Any) -> WeightSource:
    """The slots as a consumer with float16 activations reads them.

    Args:
        shared: `wgmma.Shared`.
    """
    read_scales, slots = make_read_scales(plan.layout), plan.ring
    full_at, empty_at = 4 * shared.weights_full, 4 * shared.weights_empty

    @ptx.device_function
    def begin(io, pipeline, registers):
        registers.cursor[_SLOT], registers.cursor[_PHASE] = i32(0), i32(0)

    @ptx.large_device_function
    def read_next(io, pipeline, registers):
        words, barriers, lane = pipeline.words, pipeline.barriers, pipeline.lane
        codes, scales, cursor = registers.codes, registers.scales, registers.cursor
        slot, at = u32(8) * u32(cursor[_SLOT]), i32(pipeline.slots + cursor[_SLOT] * FP8_SLOT_WORDS)
        ptx.barrier_wait(barriers, u32(pipeline.stages + u32(full_at) + slot), u32(cursor[_PHASE]))
        scales[0], scales[1] = read_scales(words, at, lane)
        for piece in range(_PIECES):
            w0, w1, w2, w3 = ptx.load_shared_16(words, at + _PIECE_WORDS * piece + lane * 4)
            i = 4 * piece
            codes[i], codes[i + 1], codes[i + 2], codes[i + 3] = w0, w1, w2, w3
        ptx.sync_warp()  # all lanes have read
        if lane == 0:
            ptx.barrier_arrive(barriers, u32(pipeline.stages + u32(empty_at) + slot))
        cursor[_SLOT] = i32(cursor[_SLOT] + 1)
        if cursor[_SLOT] == slots:
            cursor[_SLOT], cursor[_PHASE] = i32(0), i32(cursor[_PHASE] ^ 1)

    return WeightSource(begin, read_next, _CURSOR_WORDS, FP8_TILE_WORDS)
