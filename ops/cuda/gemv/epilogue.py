"""Epilogues of a GEMV: split-K partial sums are reduced in a fixed order, then stored, added, gated or rotated.

The reduction gives the same result in every run: the partial sums of a tile's warps lie in shared memory and are added
from the first warp to the last. An epilogue gets two finished rows of a tile, r and r + 8, for one token: neighbours of
8 rows in plain order; in paired order gate and up of one unit, or the two elements of a head that RoPE rotates.
"""

import math
from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.elementwise import geglu
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan
from numba_atomflow.ops.cuda.scalars import f32, u16

_LOG2_E = f32(math.log2(math.e))
_ZERO, _ONE = f32(0.0), f32(1.0)


class Epilogue(NamedTuple):
    """Device functions that read and write the kernel's arguments `io`.

    Attributes:
        store: (io, tile, r, token, low, high) for the finished rows r and r + 8 of a tile.
        prefetch: (io, thread): prefetch what `store` reads and no kernel of the step writes; runs while the kernel
            before still does.
    """

    store: Any
    prefetch: Any


@ptx.device_function
def swiglu(gate, up):
    """silu(gate) * up."""
    sigmoid = _ONE / (_ONE + ptx.exp2(-gate * _LOG2_E))
    return gate * sigmoid * up


@ptx.device_function
def rope_pair(low, high, cosine, sine):
    """The two elements of a head that RoPE rotates together, rotated."""
    return low * cosine - high * sine, high * cosine + low * sine


@ptx.device_function
def _no_prefetch(io, thread):
    """What the epilogue reads was written in this step."""


# --- split-K ---------------------------------------------------------------------------------------------------------


def make_write_partials(plan: GemvPlan) -> Any:
    """Device function (start, warp, lane, sums, floats): a warp's sums to the buffer of partial sums at `start`."""
    tokens = plan.tokens

    @ptx.device_function
    def write_partials(start, warp, lane, sums, floats):
        base = start + warp * 16 * tokens + (lane >> 2) * tokens
        for i in range(2):
            token = (lane & 3) * 2 + i
            if token < tokens:
                floats[base + token] = sums[i]
                floats[base + 8 * tokens + token] = sums[2 + i]

    return write_partials


def make_reduce_partials(plan: GemvPlan, store: Any) -> Any:
    """Device function (io, tile, has_tile, start, slot, k_slice, lane, floats): reduce the partial sums of a tile in
    the buffer at `start`, and store them by the epilogue. `slot`: which of the CTA's tiles it is; `has_tile`: whether
    there is one.
    """
    tokens, split_k = plan.tokens, plan.split_k
    pairs, tile_threads = 8 * tokens, split_k * 32

    @ptx.device_function
    def reduce_partials(io, tile, has_tile, start, slot, k_slice, lane, floats):
        pair = k_slice * 32 + lane
        while pair < pairs and has_tile:
            low, high = _ZERO, _ZERO
            for k in range(split_k):
                index = start + (slot * split_k + k) * 16 * tokens + pair
                low += floats[index]
                high += floats[index + 8 * tokens]
            store(io, tile, pair // tokens, pair % tokens, low, high)
            pair += tile_threads

    return reduce_partials


# --- epilogues -------------------------------------------------------------------------------------------------------


def make_store_epilogue(plan: GemvPlan) -> Epilogue:
    """Float32 to `io.y` [tokens, out_features]. Plain row order."""
    rows = plan.layout.out_features

    @ptx.device_function
    def store(io, tile, r, token, low, high):
        row = tile * 16 + r
        if row < rows:
            io.y[token * rows + row] = low
        if row + 8 < rows:
            io.y[token * rows + row + 8] = high

    return Epilogue(store, _no_prefetch)


def make_add_epilogue(plan: GemvPlan) -> Epilogue:
    """Add to `io.residual`, float32 [tokens, out_features]. Plain row order."""
    rows = plan.layout.out_features
    all_full = rows % 16 == 0

    @ptx.device_function
    def add(io, tile, r, token, low, high):
        row = tile * 16 + r
        index = token * rows + row
        if all_full or row + 8 < rows:
            old_low, old_high = (
                io.residual[index],
                io.residual[index + 8],
            )  # both loads are issued before the first store
            io.residual[index] = old_low + low
            io.residual[index + 8] = old_high + high
        elif row < rows:
            io.residual[index] += low

    return Epilogue(add, _no_prefetch)


def make_swiglu_epilogue(plan: GemvPlan, y_pitch: int, *, gelu: bool = False) -> Epilogue:
    """silu(gate) * up, or gelu(gate) * up, to `io.intermediate`, float16 bits [tokens, y_pitch]. Rows paired with
    half = number of units.
    """
    units = plan.layout.half
    gated = geglu if gelu else swiglu

    @ptx.device_function
    def store(io, tile, r, token, gate, up):
        unit = tile * 8 + r
        if unit < units:
            io.intermediate[token * y_pitch + unit] = u16(ptx.f16_bits(gated(gate, up)))

    return Epilogue(store, _no_prefetch)


@ptx.device_function
def _contiguous_slot(io, token):
    """Position of a token, and the row of the cache that its key and value go to."""
    position = io.position[0] + token
    return position, position


@ptx.device_function
def _paged_slot(io, token):
    """The same for tokens of any sequences."""
    return io.positions[token], io.slots[token]


def make_qkv_epilogue(plan: GemvPlan, heads: int, kv_heads: int, *, paged: bool) -> Epilogue:
    """RoPE on q and k; q to `io.q`, k and v to the KV cache. Rows paired with half = head_dim / 2.

    Reads `io.cosines` and `io.sines`, and `io.position`, or `io.positions` and `io.slots` if paged.
    """
    half, section_tiles = plan.layout.half, plan.layout.section_tiles
    q_width, kv_width = 2 * half * heads, 2 * half * kv_heads
    slot_of = _paged_slot if paged else _contiguous_slot

    @ptx.device_function
    def put(target, start, low, high):
        target[start] = u16(ptx.f16_bits(low))
        target[start + half] = u16(ptx.f16_bits(high))

    @ptx.device_function
    def store(io, tile, r, token, low, high):
        head, i = tile // section_tiles, tile % section_tiles * 8 + r
        position, slot = slot_of(io, token)
        if head >= heads + kv_heads:
            put(io.values, slot * kv_width + (head - heads - kv_heads) * 2 * half + i, low, high)
        else:
            cosine, sine = io.cosines[position * half + i], io.sines[position * half + i]
            low, high = rope_pair(low, high, cosine, sine)
            if head < heads:
                put(io.q, token * q_width + head * 2 * half + i, low, high)
            else:
                put(io.keys, slot * kv_width + (head - heads) * 2 * half + i, low, high)

    return Epilogue(store, _make_prefetch_angles(plan, slot_of))


def _make_prefetch_angles(plan: GemvPlan, slot_of: Any) -> Any:
    """Prefetch of the tokens' cosines and sines. No kernel of a step writes positions: they may be read early."""
    half, tokens, threads = plan.layout.half, plan.tokens, plan.threads
    lines = -(-half // 32)  # of 128 bytes, in a row of a table
    per_thread = -(-tokens * lines // threads)

    @ptx.device_function
    def prefetch(io, thread):
        for i in range(per_thread):
            line = i * threads + thread
            if line < tokens * lines:
                position, _ = slot_of(io, line // lines)
                offset = position * half + line % lines * 32
                ptx.prefetch_l2(io.cosines, offset)
                ptx.prefetch_l2(io.sines, offset)

    return prefetch
