"""Epilogues of a GEMM: accumulator fragments are stored, added, gated, or rotated and put into the KV cache.

The accumulators of `wgmma` m64nNk16 (16 rows of each warp) and of `mma.m16n8k16` lie in the lanes of a warp in the same
way: lane 4 g + t has, of a prepacked tile of 16 rows and of 8 tokens, rows g (c0, c1) and g + 8 (c2, c3) of tokens 2t
(c0, c2) and 2t + 1 (c1, c3). In paired row order rows g and g + 8 are gate and up of a unit, or what RoPE rotates
together. Float16 results are written as pairs: lanes of neighbouring rows exchange one token each.
"""

import math
from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import TILE_ROWS, GemmPlan
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

CONSUMERS = 256  # threads: 8 warps, each with one prepacked tile of a CTA's tile
_UNITS = TILE_ROWS // 2  # of SwiGLU in a CTA's tile
_TOKEN_VECTORS = BLOCK_WORDS // 4  # 16 bytes each, of a token in a K block
_LOG2_E = f32(math.log2(math.e))
_ZERO, _ONE = f32(0.0), f32(1.0)
_LINE = 32  # float32 of a cache line
_STAGE_BARRIERS = 8  # the first of two named barriers
_EVEN_LANE, _ODD_LANE = u32(0x5410), u32(0x3276)  # selectors: the low halves of (own, other); the high of (other, own)


@ptx.device_function
def _no_fetch(io, row_tile, token, first, end, thread, held):
    """`flush` reads nothing."""


@ptx.device_function
def _no_prefetch(io, row_tile, token, unit, lane):
    """The epilogue reads nothing that may be in device memory."""


@ptx.device_function
def _no_prepare(io, thread):
    """The epilogue reads nothing that is there before the previous kernel has ended."""


@ptx.device_function
def _no_flush(io, stage, row_tile, token, first, end, thread, held):
    """Nothing was staged."""


class GemmEpilogue(NamedTuple):
    """Device functions that read and write the kernel's arguments `io`. Without a stage there is only `store`.

    With one, up to `stage_tokens` tokens of a tile at a time are fetched for, stored (staged) and flushed, with a
    barrier before and after `store`. In the arguments, they are tokens `first` to `end` - 1 of the tile, multiples of
    8; `row_tile`: of `TILE_ROWS` rows; `token`: the tile's first token; `thread`: of all consumers.

    Attributes:
        store: (io, stage, tile, lane, token, in_stage, c0, c1, c2, c3), called by all lanes of a warp: the fragment of
            prepacked tile `tile` (it may be beyond the last) and tokens `token` to `token` + 7, which are staged as
            number `in_stage` and the following. Both are multiples of 8.
        flush: (io, stage, row_tile, token, first, end, thread, held): what was staged, to device memory.
        stage_words: uint32 of shared memory that `stage` needs, 16-byte aligned; 0: none.
        stage_tokens: tokens that are staged at a time, a multiple of 8.
        threads: that share a stage and meet at its barriers: all consumers, or a warpgroup.
        fetch: (io, row_tile, token, first, end, thread, held): load what `flush` reads.
        held: float32 registers of `held`, by which `fetch` passes it on.
        prefetch: (io, row_tile, token, unit, lane), called by all lanes of the producer warp of a `wgmma` kernel for
            each unit of a tile, before it is multiplied: bring into L2 what the epilogue reads; a part for each unit.
        prepare: (io, thread), called by all consumers of a `wgmma` kernel with float16 activations before the previous
            kernel has ended: bring into L2 what `store` reads and no kernel of a step writes.
    """

    store: Any
    flush: Any = _no_flush
    stage_words: int = 0
    stage_tokens: int = 0
    threads: int = CONSUMERS
    fetch: Any = _no_fetch
    held: int = 0
    prefetch: Any = _no_prefetch
    prepare: Any = _no_prepare


def make_stage_barrier(epilogue: GemmEpilogue) -> Any:
    """Device function (thread): the barrier of those that share a stage."""
    shared_by_all, threads = epilogue.threads == CONSUMERS, epilogue.threads

    @ptx.device_function
    def stage_barrier(thread):
        group = 0 if shared_by_all else thread >> 7
        ptx.named_barrier_sync(u32(_STAGE_BARRIERS + group), u32(threads))

    return stage_barrier


@ptx.device_function
def swiglu_approx(gate, up):
    """silu(gate) * up, with a relative error of some 2^-21: before it is rounded to float16."""
    return gate * ptx.reciprocal(_ONE + ptx.exp2(-gate * _LOG2_E)) * up


@ptx.device_function
def pair_rows(lane, a, b):
    """Float16 of rows g & ~1 and g | 1 in one word, of token 2t for even g and 2t + 1 for odd g, from every lane's
    (row g, token 2t) `a` and (row g, token 2t + 1) `b`.
    """
    own = ptx.pack_f16x2(a, b)
    other = ptx.shuffle_xor_u32(own, 4)
    return ptx.permute_bytes(own, other, _ODD_LANE if lane & 4 else _EVEN_LANE)


def make_store_epilogue(plan: GemmPlan) -> GemmEpilogue:
    """Float32 to `io.y` [tokens, out_features]. Plain row order."""
    rows = plan.layout.out_features

    @ptx.device_function
    def store(io, stage, tile, lane, token, in_stage, c0, c1, c2, c3):
        row = tile * 16 + (lane >> 2)
        index = (token + (lane & 3) * 2) * rows + row
        if row < rows:
            ptx.store_f32(io.y, index, c0)
            ptx.store_f32(io.y, index + rows, c1)
        if row + 8 < rows:
            ptx.store_f32(io.y, index + 8, c2)
            ptx.store_f32(io.y, index + rows + 8, c3)

    return GemmEpilogue(store)


def make_add_epilogue(plan: GemmPlan) -> GemmEpilogue:
    """Add to `io.residual`, float32 [tokens, out_features]. Plain row order.

    L2 adds, and no thread waits for the old value; a launch adds once to an element.
    """
    rows, tiles = plan.layout.out_features, plan.layout.tiles
    all_full = rows % 16 == 0

    @ptx.device_function
    def add(io, stage, tile, lane, token, in_stage, c0, c1, c2, c3):
        row = tile * 16 + (lane >> 2)
        index = (token + (lane & 3) * 2) * rows + row
        if tile < tiles if all_full else row + 8 < rows:
            ptx.add_f32(io.residual, index, c0)
            ptx.add_f32(io.residual, index + rows, c1)
            ptx.add_f32(io.residual, index + 8, c2)
            ptx.add_f32(io.residual, index + rows + 8, c3)
        elif not all_full and row < rows:
            ptx.add_f32(io.residual, index, c0)
            ptx.add_f32(io.residual, index + rows, c1)

    return GemmEpilogue(add)


def make_swiglu_epilogue(plan: GemmPlan, intermediate: ActivationTiles) -> GemmEpilogue:
    """silu(gate) * up to `io.intermediate`, tiled float16. Rows paired with half = number of units.

    A CTA's tile is 64 units, one K block of the intermediate's tiles: it is staged in the order of these, where its
    tokens are contiguous, and written 16 bytes a lane. K blocks beyond the last unit are padding and are written as
    zeros: weights beyond the last tile count as zero.
    """
    tiles, blocks, block_words = plan.layout.tiles, intermediate.blocks, intermediate.block_words
    tile_words = plan.tile_tokens * BLOCK_WORDS
    in_block = ActivationTiles(_UNITS, plan.tile_tokens).make_word_index()  # a block by itself, padded to two

    @ptx.device_function
    def store(io, stage, tile, lane, token, in_stage, c0, c1, c2, c3):
        word = pair_rows(lane, swiglu_approx(c0, c2), swiglu_approx(c1, c3))
        # The same for every multiple of 8 tokens, but for the tokens before.
        place = in_block((lane & 3) * 2 + (lane >> 2 & 1), (tile & 7) * 4 + (lane >> 3))
        stage[u32(place + in_stage * BLOCK_WORDS)] = word if tile < tiles else u32(0)

    @ptx.device_function
    def flush(io, stage, row_tile, token, first, end, thread, held):
        start = row_tile * block_words + (token + first) * BLOCK_WORDS
        if row_tile < blocks:
            for vector in range(thread, (end - first) * _TOKEN_VECTORS, CONSUMERS):
                a, b, c, d = ptx.load_shared_16(stage, vector * 4)
                ptx.store_16(io.intermediate, start + vector * 4, a, b, c, d)

    return GemmEpilogue(store, flush, tile_words, plan.tile_tokens)


def make_qkv_epilogue(plan: GemmPlan, heads: int, kv_heads: int) -> GemmEpilogue:
    """RoPE on q and k; q to `io.q`, k and v of the first `io.count` tokens to the KV cache.

    Rows paired with half = head_dim / 2, a multiple of 8. Padding tokens take the angles of the last one.
    """
    half, section_tiles, tiles = plan.layout.half, plan.layout.section_tiles, plan.layout.tiles
    q_width, kv_width = 2 * half * heads, 2 * half * kv_heads
    if half % 8:
        raise ValueError(f"heads of {2 * half}: their size must be a multiple of 16")

    @ptx.device_function
    def store(io, stage, tile, lane, token, in_stage, c0, c1, c2, c3):
        head = i32(u32(tile) // u32(section_tiles))
        i = i32(u32(tile) % u32(section_tiles) * 8 + (lane >> 2 & 7))
        position = i32(ptx.load_constant_i64(io.position, 0))
        last, first = i32(ptx.load_constant_i64(io.count, 0) - 1), i32(token + (lane & 3) * 2)
        # Selected without branches: see `store_pair_if`.
        is_query, is_value = head < heads, head >= heads + kv_heads
        c0, c2 = rotate(io, position + min(first, last), i, is_value, c0, c2)
        c1, c3 = rotate(io, position + min(i32(first + 1), last), i, is_value, c1, c3)
        low, high = pair_rows(lane, c0, c1), pair_rows(lane, c2, c3)
        row = i32(first + (lane >> 2 & 1))
        target = io.q if is_query else io.values if is_value else io.keys
        slot = row * q_width if is_query else (position + row) * kv_width
        head = head if is_query else head - heads - kv_heads if is_value else head - heads
        start = u32(slot + head * (2 * half) + (i & -2))
        condition = u32(is_query | ((tile < tiles) & (row <= last)))
        ptx.store_pair_if(target, start, low, condition)
        ptx.store_pair_if(target, start + half, high, condition)

    @ptx.device_function
    def rotate(io, position, i, is_value, low, high):
        angle = u32(position * half + i)
        cosine, sine = ptx.load_constant_f32(io.cosines, angle), ptx.load_constant_f32(io.sines, angle)
        return rope_pair(low, high, _ONE if is_value else cosine, _ZERO if is_value else sine)

    epilogue = GemmEpilogue(store)
    return epilogue._replace(prepare=_make_prefetch_angles(plan)) if plan.resident > 1 else epilogue


def _make_prefetch_angles(plan: GemmPlan) -> Any:
    """`GemmEpilogue.prepare` of the first tile of tokens: their angles were last read a layer ago, before all its
    weights, and would come from device memory at the very end of the kernel.
    """
    half, lines, tile_tokens = plan.layout.half, -(-plan.layout.half // _LINE), plan.tile_tokens

    @ptx.device_function
    def prepare(io, thread):
        token, line = i32(u32(thread) // u32(lines)), i32(u32(thread) % u32(lines))
        if token < tile_tokens:
            last = i32(ptx.load_constant_i64(io.count, 0) - 1)
            angle = u32((i32(ptx.load_constant_i64(io.position, 0)) + min(token, last)) * half + line * _LINE)
            ptx.prefetch_l2(io.cosines, angle)
            ptx.prefetch_l2(io.sines, angle)

    return prepare
