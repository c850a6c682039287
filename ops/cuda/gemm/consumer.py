"""What consumers of a `wgmma` main loop do outside of it: where their weights begin, and the end of a tile."""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.fixup import CONSUMER_BARRIER, make_fixup
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
    """Device function (io, stage, prepacked, lane, token, sums): `epilogue.store` for all fragments of a warp.

    In several loops: LLVM does not unroll one of too many instructions, and an array that is indexed in a loop does not
    stay in registers.
    """
    fragments, store = plan.tile_tokens // 8, epilogue.store

    @ptx.large_device_function
    def store_fragment(io, stage, prepacked, lane, token, in_tile, c0, c1, c2, c3):
        store(io, stage, prepacked, lane, token, in_tile, c0, c1, c2, c3)

    def make_loop(first: int) -> Any:
        count = min(_UNROLLED, fragments - first)

        @ptx.device_function
        def store_some(io, stage, prepacked, lane, token, sums):
            for j in range(count):
                i = 4 * (first + j)
                c0, c1, c2, c3 = sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
                store_fragment(io, stage, prepacked, lane, token + 2 * i, 2 * i, c0, c1, c2, c3)

        return store_some

    first, second, third, fourth = (make_loop(start * _UNROLLED) for start in range(4))

    @ptx.device_function
    def store_all(io, stage, prepacked, lane, token, sums):
        first(io, stage, prepacked, lane, token, sums)
        if fragments > _UNROLLED:
            second(io, stage, prepacked, lane, token, sums)
        if fragments > 2 * _UNROLLED:
            third(io, stage, prepacked, lane, token, sums)
        if fragments > 3 * _UNROLLED:
            fourth(io, stage, prepacked, lane, token, sums)

    return store_all


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


def make_tile_writer(
    plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, epilogue_at: int, state_at: int
) -> TileWriter:
    """For an epilogue's stage and a fix-up's state so many words behind `skipped`."""
    units, tile_tokens, fixup = plan.units, plan.tile_tokens, make_fixup(plan, schedule, epilogue, CONSUMERS)
    put, settle = fixup.put, fixup.settle
    store_all, flush, staged = _make_store_all(plan, epilogue), epilogue.flush, epilogue.stage_words > 0

    @ptx.device_function
    def write(io, words, skipped, number, shared, tile, first, last, sums, thread):
        if last - first < units:
            shared = number if shared < 0 else shared
            put(io, words, skipped + state_at, number - shared, tile, sums, thread)
        else:
            row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
            token, prepacked = token_tile * tile_tokens, row_tile * CONSUMER_WARPS + (thread >> 5)
            stage = words[skipped + epilogue_at :]
            if staged:
                ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
            store_all(io, stage, prepacked, thread & 31, token, sums)
            if staged:
                ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
                flush(io, stage, row_tile, token, 0, tile_tokens, thread)
        return shared

    @ptx.device_function
    def finish(io, words, skipped, shared, thread):
        if shared >= 0:
            settle(io, words, skipped + state_at, words[skipped + epilogue_at :], shared, thread)

    return TileWriter(write, finish)
