"""Epilogues of wide tiles: sums are staged in shared memory, and taken from there as whole rows of a token.

A fragment has 8 rows of a token: 32 bytes of float32. As they lie in the lanes, each sum takes accesses of 4 bytes to
memory, and a tile of 256 tokens waits 32 times for what they are rotated by. So each warpgroup stages its 64 rows of
some tokens as float32, and a lane then takes 4 rows of a token at a time: 64 bytes of float16 or 256 of float32 are
written side by side. What is read for them is asked for before they are staged. Warpgroups do not wait for each other.

A stage is [token][64 rows]: 16 chunks of 16 bytes for each token, chunk c at c XOR (token & 6). Neither the 4-byte
stores of 8 rows of 4 tokens nor the 16-byte loads of 8 chunks of a token meet in a bank.
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue, make_add_epilogue, make_qkv_epilogue
from numba_atomflow.ops.cuda.gemm.plan import TILE_ROWS, GemmPlan
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

_GROUP = CONSUMERS // 2  # threads that share a stage: a warpgroup
_ROWS = TILE_ROWS // 2  # of a warpgroup: words of a token in its stage
_CHUNKS = _ROWS // 4  # 16 bytes each, of a token
_ADD_TOKENS = _GROUP // _CHUNKS  # that a warpgroup adds at a time
_PAIR_CHUNKS = _CHUNKS // 2  # chunks of low rows; those of high rows follow
_PAIR_TOKENS = _GROUP // _PAIR_CHUNKS  # that a warpgroup rotates at a time
_STAGED_FROM = 96  # tokens of a tile
_LINE = 32  # float32 of a cache line
_PREFETCHED_FROM = 192  # tokens of a tile: units of fewer take less time than the producer needs for both
_UNITS_WITHOUT_PREFETCH = 4  # of a tile
_ZERO, _ONE = f32(0.0), f32(1.0)


def is_staged(plan: GemmPlan) -> bool:
    """Whether a plan's tiles are wide enough. With `mma.sync`, which leaves less memory for a stage, they are not."""
    return plan.instructions == "wgmma" and plan.tile_tokens >= _STAGED_FROM


def choose_add_epilogue(plan: GemmPlan) -> GemmEpilogue:
    """Add to `io.residual`, float32 [tokens, out_features]. Plain row order.

    L2 adds, as fast as loads and stores (docs/prompts.md); a launch adds once to an element.
    """
    return (
        make_staged_add_epilogue(plan)
        if is_staged(plan) and plan.layout.out_features % 4 == 0
        else make_add_epilogue(plan)
    )


def choose_qkv_epilogue(plan: GemmPlan, heads: int, kv_heads: int) -> GemmEpilogue:
    """RoPE on q and k; q to `io.q`, k and v of the first `io.count` tokens to the KV cache. Rows in pairs."""
    make = make_staged_qkv_epilogue if is_staged(plan) else make_qkv_epilogue
    return make(plan, heads, kv_heads)


def _stage_tokens(plan: GemmPlan) -> int:
    """Tokens that are staged at a time: those whose sums fit into a pipeline stage, which a plan leaves room for."""
    return plan.stage_words // TILE_ROWS // 8 * 8


def _make_store(stage_tokens: int, tile_rows: int, distance: int) -> Any:
    """`GemmEpilogue.store`: rows g of a warp's tile lie behind `tile_rows` for each warp of the group before it, and
    rows g + 8 behind those at `distance`, a power of two.
    """

    @ptx.device_function
    def store(io, stage, tile, lane, token, in_stage, c0, c1, c2, c3):
        pair = (lane & 3) * 2
        row = (tile & 3) * tile_rows + (lane >> 2)
        low = ((tile >> 2 & 1) * stage_tokens + pair) * _ROWS + (row ^ pair * 4)  # for every 8 tokens the same
        high = low ^ distance
        stage[u32(low + in_stage * _ROWS)] = ptx.f32_bits(c0)
        stage[u32(low + in_stage * _ROWS + _ROWS)] = ptx.f32_bits(c1)
        stage[u32(high + in_stage * _ROWS)] = ptx.f32_bits(c2)
        stage[u32(high + in_stage * _ROWS + _ROWS)] = ptx.f32_bits(c3)

    return store


def make_staged_add_epilogue(plan: GemmPlan) -> GemmEpilogue:
    """`epilogue.make_add_epilogue`, for `out_features` that are a multiple of 4."""
    rows, stage_tokens = plan.layout.out_features, _stage_tokens(plan)
    turns = stage_tokens // _ADD_TOKENS

    @ptx.device_function
    def flush(io, stage, row_tile, token, first, end, thread, held):
        group, place, chunk = thread >> 7, thread >> 4 & 7, thread & 15
        at = (group * stage_tokens + place) * _ROWS + (chunk ^ (place & 6)) * 4
        row = row_tile * TILE_ROWS + group * _ROWS + chunk * 4
        index = (token + first + place) * rows + row
        for i in range(turns):
            if row < rows and i * _ADD_TOKENS < end - first:
                a, b, c, d = ptx.load_f32x4(stage, at + i * _ADD_TOKENS * _ROWS)
                ptx.add_f32x4(io.residual, index + i * _ADD_TOKENS * rows, a, b, c, d)

    epilogue = GemmEpilogue(_make_store(stage_tokens, 16, 8), flush, 2 * stage_tokens * _ROWS, stage_tokens, _GROUP)
    if plan.tile_tokens < _PREFETCHED_FROM:
        return epilogue
    return epilogue._replace(prefetch=_make_prefetch_residual(plan))


def _make_prefetch_residual(plan: GemmPlan) -> Any:
    """`GemmEpilogue.prefetch` of the residual: an L2 add waits for device memory where the line is not in L2, and all
    CTAs add at the same time. Not for the first units, whose x is copied meanwhile.
    """
    rows, lines = plan.layout.out_features, plan.tile_tokens * (TILE_ROWS // _LINE)
    waiting = min(_UNITS_WITHOUT_PREFETCH, plan.units - 1)
    units = plan.units - waiting

    @ptx.large_device_function
    def prefetch(io, row_tile, token, unit, lane):
        unit = i32(unit - waiting)
        if unit >= 0:
            end = i32(u32((unit + 1) * lines) // u32(units))
            line = i32(i32(u32(unit * lines) // u32(units)) + lane)
            while line < end:
                row = row_tile * TILE_ROWS + (line & 3) * _LINE
                if row < rows:
                    ptx.prefetch_l2(io.residual, (token + (line >> 2)) * rows + row)
                line = i32(line + 32)

    return prefetch


def make_staged_qkv_epilogue(plan: GemmPlan, heads: int, kv_heads: int) -> GemmEpilogue:
    """`epilogue.make_qkv_epilogue`. A lane's 4 pairs of rows are of one head, since half a head is a multiple of 8."""
    half, stage_tokens = plan.layout.half, _stage_tokens(plan)
    q_width, kv_width, rotated_heads = 2 * half * heads, 2 * half * kv_heads, heads + kv_heads
    turns = -(-stage_tokens // _PAIR_TOKENS)

    @ptx.device_function
    def place_of(row_tile, thread):
        """Head, the first of 4 pairs in it, and token of a turn."""
        pair = u32(row_tile * _ROWS + (thread >> 7) * (_ROWS // 2) + (thread & 7) * 4)
        head = pair // u32(half)
        return i32(head), i32(pair - head * u32(half)), i32(thread >> 3 & 15)

    @ptx.device_function
    def fetch(io, row_tile, token, first, end, thread, held):
        head, i, place = place_of(row_tile, thread)
        position = i32(ptx.load_constant_i64(io.position, 0))
        last = i32(ptx.load_constant_i64(io.count, 0) - 1)
        for turn in range(turns):
            at = 8 * turn
            for j in range(4):
                held[at + j], held[at + 4 + j] = _ONE, _ZERO
        if head < rotated_heads:
            for turn in range(turns):
                at = 8 * turn
                row = i32(token + first + place + turn * _PAIR_TOKENS)
                angle = u32((position + min(row, last)) * half + i)
                c0, c1, c2, c3 = ptx.load_constant_f32x4(io.cosines, angle)
                s0, s1, s2, s3 = ptx.load_constant_f32x4(io.sines, angle)
                held[at], held[at + 1], held[at + 2], held[at + 3] = c0, c1, c2, c3
                held[at + 4], held[at + 5], held[at + 6], held[at + 7] = s0, s1, s2, s3

    @ptx.device_function
    def flush(io, stage, row_tile, token, first, end, thread, held):
        head, i, place = place_of(row_tile, thread)
        position = i32(ptx.load_constant_i64(io.position, 0))
        last = i32(ptx.load_constant_i64(io.count, 0) - 1)
        is_query, is_value = head < heads, head >= rotated_heads
        exists = head < rotated_heads + kv_heads
        target = io.q if is_query else io.values if is_value else io.keys
        width = q_width if is_query else kv_width
        head = head if is_query else head - rotated_heads if is_value else head - heads
        start = i32(head * (2 * half) + i if is_query else position * kv_width + head * (2 * half) + i)
        from_group = (thread >> 7) * stage_tokens
        for turn in range(turns):
            k = 8 * turn
            in_stage = i32(place + turn * _PAIR_TOKENS)
            inside = in_stage < end - first
            in_stage = min(in_stage, i32(stage_tokens - 1))  # of what is beyond, nothing is stored
            at = (from_group + in_stage) * _ROWS + (((thread & 7) ^ (in_stage & 6)) * 4)
            a0, a1, a2, a3 = ptx.load_f32x4(stage, at)
            b0, b1, b2, b3 = ptx.load_f32x4(stage, at + _ROWS // 2)
            a0, b0 = rope_pair(a0, b0, held[k], held[k + 4])
            a1, b1 = rope_pair(a1, b1, held[k + 1], held[k + 5])
            a2, b2 = rope_pair(a2, b2, held[k + 2], held[k + 6])
            a3, b3 = rope_pair(a3, b3, held[k + 3], held[k + 7])
            row = i32(token + first + in_stage)
            slot = u32(row * width + start)
            condition = u32(inside & (is_query | (exists & (row <= last))))
            ptx.store_pairs_if(target, slot, ptx.pack_f16x2(a0, a1), ptx.pack_f16x2(a2, a3), condition)
            ptx.store_pairs_if(target, slot + half, ptx.pack_f16x2(b0, b1), ptx.pack_f16x2(b2, b3), condition)

    words = 2 * stage_tokens * _ROWS
    return GemmEpilogue(_make_store(stage_tokens, 8, _ROWS // 2), flush, words, stage_tokens, _GROUP, fetch, 8 * turns)
