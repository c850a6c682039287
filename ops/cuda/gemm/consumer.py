"""What consumers of a `wgmma` main loop do outside of it: where their weights begin, and the end of a tile."""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.fixup import CONSUMER_BARRIER, make_fixup
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.scalars import i32, u32

CONSUMER_WARPS = CONSUMERS // 32


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


def make_write_tile(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, epilogue_at: int, flag_at: int) -> Any:
    """Device function (io, words, skipped, tile, first, last, sums, thread): the fix-up of a tile that is shared, and
    the epilogue. By all consumer threads. `skipped`: words of shared memory before the first stage; the epilogue's
    stage and the fix-up's flag are `epilogue_at` and `flag_at` words behind.
    """
    units, tile_tokens, fragments = plan.units, plan.tile_tokens, plan.tile_tokens // 8
    fixup = make_fixup(plan, schedule, CONSUMERS)
    store, flush, staged = epilogue.store, epilogue.flush, epilogue.stage_words > 0

    @ptx.device_function
    def write_tile(io, words, skipped, tile, first, last, sums, thread):
        whole = True
        if last - first < units:
            whole = fixup(io, words, skipped + flag_at, tile, sums, thread)
        if whole:
            row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
            token, prepacked = token_tile * tile_tokens, row_tile * CONSUMER_WARPS + (thread >> 5)
            stage = words[skipped + epilogue_at :]
            if staged:
                ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
            for j in range(fragments):
                c0, c1, c2, c3 = sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]
                store(io, stage, prepacked, thread & 31, token + 8 * j, 8 * j, c0, c1, c2, c3)
            if staged:
                ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
                flush(io, stage, row_tile, token, thread)

    return write_tile
