"""What consumers of a `wgmma` main loop do outside of it: where their weights begin, and the end of a tile."""

from itertools import pairwise
from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue, make_stage_barrier
from numba_atomflow.ops.cuda.gemm.fixup import make_fixup
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import i32, u32

CONSUMER_WARPS = CONSUMERS // 32
_UNROLLED = 8  # fragments that are stored in a loop


def make_weights_start(plan: GemmPlan) -> Any:
    """Device function (tile, warp, token_tiles) -> word at which the prepacked tile of a warp begins.

    Rows beyond the last tile repeat it, to be discarded.
    """
    tiles, tile_words = plan.layout.tiles, plan.layout.tile_words

    @ptx.device_function
    def weights_start(tile, warp, token_tiles):
        prepacked = i32(i32(u32(tile) // u32(token_tiles)) * CONSUMER_WARPS + warp)
        return i32((prepacked if prepacked < tiles else tiles - 1) * tile_words)

    return weights_start


def _make_store_all(plan: GemmPlan, epilogue: GemmEpilogue) -> Any:
    """Device function (io, stage, row_tile, token, sums, thread): the epilogue of a whole tile.

    In several loops: LLVM does not unroll one of too many instructions, and an array that is indexed in a loop does not
    stay in registers.
    """
    store, fetch, flush, stage_barrier = epilogue.store, epilogue.fetch, epilogue.flush, make_stage_barrier(epilogue)
    staged, held_count = epilogue.stage_words > 0, max(1, epilogue.held)
    tile_tokens, stage_tokens = plan.tile_tokens, epilogue.stage_tokens if epilogue.stage_words else plan.tile_tokens

    @ptx.large_device_function
    def store_fragment(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3):
        store(io, stage, prepacked, lane, token, in_stage, c0, c1, c2, c3)

    def make_loop(first: int, end: int) -> Any:
        """Of tokens `first` to `end` - 1, which are staged together with others if they are many."""
        stage_first = first // stage_tokens * stage_tokens
        stage_end = min(stage_first + stage_tokens, tile_tokens)
        begins, ends = staged and first == stage_first, staged and end == stage_end

        @ptx.device_function
        def store_some(io, stage, row_tile, token, sums, thread):
            held = cuda.local.array(held_count, float32)
            prepacked = row_tile * CONSUMER_WARPS + (thread >> 5)
            if begins:
                fetch(io, row_tile, token, stage_first, stage_end, thread, held)
                stage_barrier(thread)
            for j in range((end - first) // 8):
                i, in_tile = first // 2 + 4 * j, first + 8 * j
                c0, c1, c2, c3 = sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
                store_fragment(
                    io, stage, prepacked, thread & 31, token + in_tile, in_tile - stage_first, c0, c1, c2, c3
                )
            if ends:
                stage_barrier(thread)
                flush(io, stage, row_tile, token, stage_first, stage_end, thread, held)

        return store_some

    stages = ((first, min(first + stage_tokens, tile_tokens)) for first in range(0, tile_tokens, stage_tokens))
    starts = [first for stage in stages for first in range(*stage, 8 * _UNROLLED)]
    return _in_order([make_loop(first, end) for first, end in pairwise([*starts, tile_tokens])])


def _in_order(functions: list[Any]) -> Any:
    """Device function that calls these of six arguments one after the other."""
    first, *rest = functions
    if not rest:
        return first
    others = _in_order(rest)

    @ptx.device_function
    def both(io, stage, row_tile, token, sums, thread):
        first(io, stage, row_tile, token, sums, thread)
        others(io, stage, row_tile, token, sums, thread)

    return both


class TileWriter(NamedTuple):
    """Device functions, called by all consumer threads. `skipped`: words of shared memory before the first stage.

    Attributes:
        write: (io, words, skipped, number, shared, tile, first, last, sums, thread) -> `shared`: the epilogue of work
            number `number`, or the partial sums of a tile that is shared. `shared`: what the last call returned, -1 for
            the first: the number of the first shared tile.
        finish: (io, words, skipped, shared, thread): after the last tile.
    """

    write: Any
    finish: Any


def make_tile_writer(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, epilogue_at: int) -> TileWriter:
    """For an epilogue's stage so many words behind `skipped`."""
    units, tile_tokens, fixup = plan.units, plan.tile_tokens, make_fixup(plan, schedule, epilogue, CONSUMERS)
    put, settle = fixup.put, fixup.settle
    store_all = _make_store_all(plan, epilogue)

    @ptx.device_function
    def write(io, words, skipped, number, shared, tile, first, last, sums, thread):
        if last - first < units:
            shared = number if shared < 0 else shared
            put(io, tile, sums, thread)
        else:
            row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
            store_all(io, words[skipped + epilogue_at :], row_tile, token_tile * tile_tokens, sums, thread)
        return shared

    @ptx.device_function
    def finish(io, words, skipped, shared, thread):
        if shared >= 0:
            settle(io, words[skipped + epilogue_at :], shared, thread)

    return TileWriter(write, finish)
