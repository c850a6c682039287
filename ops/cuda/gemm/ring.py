"""Weights of the `wgmma` main loop on their way through shared memory: a ring of units for each consumer lane.

For float16 weights, and for tiles of few tokens. From `plan.COPIED_FROM` tokens on, other warps copy FP8 weights
(`weight_copies.py`).

A lane multiplies the very 16 bytes that it loads (`layout/weights.py`), so that it needs no other thread for them: it
copies its part of a unit into a slot of its own (`cp.async`), as many units ahead as there are slots, waits for its own
copies, reads the slot back, converts it, and fills it again. No barrier is involved. Loads into registers would do the
same with fewer instructions, but ptxas lets all loads of a loop complete on one scoreboard: a wait for the oldest
is one for the latest, too.

The ring runs on from one tile to the next. It is filled before the previous kernel has ended: weights do not depend
on it.
"""

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import make_weights_start
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.gemm.weights import WeightSource, make_piece_offset
from numba_atomflow.ops.cuda.layout.weights import TILE_ROWS, make_offsets
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

# Of a cursor: the slot that is read and filled next; and what is copied next: number of the work after it, word at
# which its prepacked tile begins, unit, and its last unit + 1; words at which the lane's codes and its scale of row g
# begin, and from rows 0-7 to rows 8-15 (where these are split).
SLOT, NUMBER, START, UNIT, LAST, CODES, SCALES, HALF, CURSOR_WORDS = range(9)
_PIECE_WORDS = 128  # 16 bytes of each lane of a warp
_ONE, _ZERO = f32(1.0), f32(0.0)


def make_weight_ring(plan: GemmPlan, schedule: Schedule) -> WeightSource:
    """The ring of `plan.ring` units. `begin` fills it; `read_next` reads the oldest unit, and fills its slot again."""
    work, weights_start, count = schedule.work, make_weights_start(plan), plan.ring
    layout, slot_words, pieces = plan.layout, plan.slot_words, plan.layout.format.bits // 2
    scaled, split, k_tile_groups = layout.format.scaled, layout.split_rows, layout.k_tile_groups
    piece_at, (_, scale_at), scales_at = make_piece_offset(layout), make_offsets(layout), slot_words - 64
    # From a unit to the next of its k-tile:
    unit_codes, unit_scales = pieces * _PIECE_WORDS // (1 + split), TILE_ROWS // (1 + split)
    halves = 2 if split else 1  # runs of codes of a unit: rows 0-7 and rows 8-15, or all
    wait_for_oldest = ptx.make_wait_copies(count - 1)

    @ptx.large_device_function
    def copy(io, words, target, cursor, lane):
        """A unit to a slot, which begins at address `target`."""
        place = u32(target + u32(16) * u32(lane))
        for half in range(halves):
            start = u32(cursor[CODES] + half * cursor[HALF])
            for i in range(pieces // halves):
                to = u32(place + u32(4 * _PIECE_WORDS) * u32(i * halves + half))
                ptx.copy_async_16(words, to, io.weights, start + i * _PIECE_WORDS, u32(16))
        if scaled:
            place = u32(target + u32(4 * scales_at) + u32(4) * u32(lane))
            ptx.copy_async_4(words, place, io.weights, u32(cursor[SCALES]))
            other = u32(cursor[SCALES] + cursor[HALF]) if split else u32(cursor[SCALES] + 1)
            ptx.copy_async_4(words, u32(place + u32(128)), io.weights, other)

    @ptx.large_device_function
    def point(cursor, lane):
        """To the codes and scales of the cursor's unit."""
        start, unit = cursor[START], cursor[UNIT]
        cursor[CODES] = start + i32(piece_at(unit, 0)) + lane * 4
        cursor[HALF] = i32(piece_at(unit, 1) - piece_at(unit, 0))
        cursor[SCALES] = start + i32(scale_at(unit, lane >> 2))

    @ptx.large_device_function
    def next_work(io, cursor, lane, warp):
        tile, first, last = work(cursor[NUMBER], io.token_tiles)
        cursor[NUMBER] = i32(cursor[NUMBER] + 1)
        cursor[START] = weights_start(tile if tile > 0 else i32(0), warp, io.token_tiles)
        cursor[UNIT], cursor[LAST] = first, last if tile >= 0 else first
        point(cursor, lane)

    @ptx.device_function
    def refill(io, words, slots, slot, cursor, lane, warp):
        """Copy the next unit, if there is one, to a slot. `slots`: word at which those of the warp begin."""
        if cursor[UNIT] < cursor[LAST]:
            copy(io, words, u32(ptx.shared_address(words, slots + slot * slot_words)), cursor, lane)
            cursor[UNIT] = i32(cursor[UNIT] + 1)
            cursor[CODES] += i32(unit_codes)
            cursor[SCALES] += i32(unit_scales)
            if cursor[UNIT] == cursor[LAST]:
                next_work(io, cursor, lane, warp)
            elif split and u32(cursor[UNIT]) % u32(k_tile_groups) == 0:
                point(cursor, lane)
        ptx.commit_copies()  # perhaps of nothing: a group for every unit, so that waiting is counting

    @ptx.device_function
    def begin(io, pipeline, registers):
        cursor, lane, warp = registers.cursor, pipeline.lane, pipeline.warp
        cursor[SLOT], cursor[NUMBER] = i32(0), i32(0)
        next_work(io, cursor, lane, warp)
        for slot in range(count):
            refill(io, pipeline.words, pipeline.slots, i32(slot), cursor, lane, warp)

    @ptx.large_device_function
    def read(words, slots, slot, lane, codes, scales):
        """Wait for the oldest unit, which is in this slot."""
        wait_for_oldest()
        at = i32(slots + slot * slot_words)
        if scaled:
            scales[0] = ptx.bits_f32(words[u32(at + scales_at + lane)])
            scales[1] = ptx.bits_f32(words[u32(at + scales_at + 32 + lane)])
        for piece in range(pieces):
            w0, w1, w2, w3 = ptx.load_shared_16(words, at + _PIECE_WORDS * piece + lane * 4)
            i = 4 * piece
            codes[i], codes[i + 1], codes[i + 2], codes[i + 3] = w0, w1, w2, w3
        if not scaled:  # always 1, but not for the compiler: see `weights.py`
            scales[0] = _ONE if len(words) > 0 else _ZERO
            scales[1] = scales[0]

    @ptx.large_device_function
    def read_next(io, pipeline, registers):
        words, cursor, lane = pipeline.words, registers.cursor, pipeline.lane
        read(words, pipeline.slots, cursor[SLOT], lane, registers.codes, registers.scales)
        refill(io, words, pipeline.slots, cursor[SLOT], cursor, lane, pipeline.warp)
        cursor[SLOT] = i32(cursor[SLOT] + 1) if cursor[SLOT] < count - 1 else i32(0)

    return WeightSource(begin, read_next, CURSOR_WORDS, count * slot_words)
