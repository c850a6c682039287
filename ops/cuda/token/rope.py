"""Bias, norm of each head, RoPE, and the KV cache: for models where the epilogue of the QKV projection cannot do it.

Without a norm of heads the two elements that RoPE rotates together end in one lane, and the epilogue of the QKV
projection does this work. Qwen3 norms each head first, which takes all of its elements: here a warp has a head. Qwen2's
bias is added here too. OLMo 2 norms all heads of q, or of k, as one: every warp reads all of them, from L2.
Cost model: a launch (2-3 us); 4 bytes read and 2 written per row of q, k and v.
"""

import math
from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U16, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32, u16

THREADS = 128
_ZERO, _ONE = f32(0.0), f32(1.0)


class RopeArguments(NamedTuple):
    """The kernel's parameter. What a model does not have (bias, norms) is not read.

    Attributes:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim].
        bias: [(heads + 2 kv_heads) * head_dim].
        q_norm, k_norm: [head_dim]; of a norm of all heads, [heads * head_dim] and [kv_heads * head_dim].
        position: [1], of the first token; the others follow.
        cosines, sines: [positions, head_dim / 2].
        q: bits of float16 [tokens, heads * head_dim].
        keys, values: bits of float16 [positions, kv_heads * head_dim].
    """

    qkv: F32
    bias: F32
    q_norm: F32
    k_norm: F32
    position: I64
    cosines: F32
    sines: F32
    q: U16
    keys: U16
    values: U16


class RopeChunkArguments(NamedTuple):
    """The parameter of the kernel for any number of tokens.

    Attributes:
        count: [1], tokens of the chunk; the others are padding, for which nothing is written.
        others: as in `RopeArguments`.
    """

    qkv: F32
    bias: F32
    q_norm: F32
    k_norm: F32
    count: I64
    position: I64
    cosines: F32
    sines: F32
    q: U16
    keys: U16
    values: U16


def rope_ctas(heads: int, kv_heads: int, tokens: int) -> int:
    """CTAs of a launch: a warp for each head of q, k and v of each token."""
    return -(-tokens * (heads + 2 * kv_heads) * 32 // THREADS)


def make_rope(
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    eps: float,
    bias: bool,
    norm: bool,
    *,
    norm_of_all_heads: bool = False,
    dependent: bool = False,
) -> Any:
    """Kernel (`RopeArguments`). Launch: `rope_ctas` CTAs of `THREADS` threads, no shared memory.

    Args:
        bias, norm: whether the model has a bias, and a norm of each head of q and k.
        norm_of_all_heads: that norm is one of all heads of q, and one of all heads of k.
    """

    @ptx.device_function
    def count_of(io):
        return tokens

    return _make_rope(heads, kv_heads, head_dim, eps, bias, norm, norm_of_all_heads, count_of, dependent)


def make_rope_chunk(
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    bias: bool,
    norm: bool,
    *,
    norm_of_all_heads: bool = False,
    dependent: bool = False,
) -> Any:
    """Kernel (`RopeChunkArguments`): the same for the first `count` tokens. Launch: as above, for all with padding."""

    @ptx.device_function
    def count_of(io):
        return io.count[0]

    return _make_rope(heads, kv_heads, head_dim, eps, bias, norm, norm_of_all_heads, count_of, dependent)


def _make_rope(
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    bias: bool,
    norm: bool,
    norm_of_all_heads: bool,
    count_of: Any,
    dependent: bool,
) -> Any:
    """`count_of`: device function (io) -> number of tokens."""
    half, all_heads = head_dim // 2, heads + 2 * kv_heads
    pairs = -(-half // 32)  # per lane
    inverse_width, epsilon = f32(1.0 / head_dim), f32(eps)
    inverse_q, inverse_k = f32(1.0 / (heads * head_dim)), f32(1.0 / (kv_heads * head_dim))
    all_norm = norm and norm_of_all_heads

    @ptx.device_function
    def sum_of_all_heads(io, first, head, lane):
        """A lane's part of the sum of squares of all heads of q, or of k, of a token whose row begins at `first`."""
        start = 0 if head < heads else heads * head_dim
        end = heads * head_dim if head < heads else (heads + kv_heads) * head_dim
        squares = _ZERO
        element = start + lane * 4
        while element < end:
            a, b, c, d = ptx.load_f32x4(io.qkv, first + element)
            if bias:
                a, b = a + io.bias[element], b + io.bias[element + 1]
                c, d = c + io.bias[element + 2], d + io.bias[element + 3]
            squares += a * a + b * b + (c * c + d * d)
            element += 128
        return squares

    @ptx.kernel(THREADS, 1)
    def rope(io):
        lows = cuda.local.array(pairs, float32)
        highs = cuda.local.array(pairs, float32)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        tokens = count_of(io)
        index = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) >> 5
        lane = cuda.threadIdx.x & 31
        has_head = index < tokens * all_heads
        token, head = min(index // all_heads, tokens - 1), index % all_heads
        start = (token * all_heads + head) * head_dim
        squares = _ZERO
        for p in range(pairs):
            i = lane + 32 * p
            lows[p], highs[p] = _ZERO, _ZERO
            if i < half:
                lows[p], highs[p] = io.qkv[start + i], io.qkv[start + half + i]
                if bias:
                    lows[p] += io.bias[head * head_dim + i]
                    highs[p] += io.bias[head * head_dim + half + i]
            squares += lows[p] * lows[p] + highs[p] * highs[p]
        if all_norm and head < heads + kv_heads:
            squares = sum_of_all_heads(io, token * all_heads * head_dim, head, lane)
        if norm:
            squares = ptx.warp_sum(squares)
        inverse = inverse_width
        if all_norm:
            inverse = inverse_q if head < heads else inverse_k
        factor = _ONE / f32(math.sqrt(squares * inverse + epsilon))
        position = io.position[0] + token
        for p in range(pairs):
            i = lane + 32 * p
            if i < half and has_head:
                low, high = lows[p], highs[p]
                if head < heads + kv_heads:
                    if norm:
                        weight = io.q_norm if head < heads else io.k_norm
                        of_head = (head if head < heads else head - heads) * head_dim if all_norm else 0
                        low *= factor * weight[of_head + i]
                        high *= factor * weight[of_head + half + i]
                    cosine, sine = io.cosines[position * half + i], io.sines[position * half + i]
                    low, high = rope_pair(low, high, cosine, sine)
                low_bits, high_bits = u16(ptx.f16_bits(low)), u16(ptx.f16_bits(high))
                if head < heads:
                    element = (token * heads + head) * head_dim + i
                    io.q[element], io.q[element + half] = low_bits, high_bits
                elif head < heads + kv_heads:
                    element = (position * kv_heads + head - heads) * head_dim + i
                    io.keys[element], io.keys[element + half] = low_bits, high_bits
                else:
                    element = (position * kv_heads + head - heads - kv_heads) * head_dim + i
                    io.values[element], io.values[element + half] = low_bits, high_bits

    return rope


def rope_kernel(
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    eps: float,
    *,
    bias: bool,
    norm: bool,
    norm_of_all_heads: bool,
    dependent: bool,
) -> Planned:
    """The spec of the kernel of `make_rope`."""
    spec = kernel_spec(
        f"rope_x{tokens}",
        make_rope,
        RopeArguments,
        THREADS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tokens=tokens,
        eps=eps,
        bias=bias,
        norm=norm,
        norm_of_all_heads=norm_of_all_heads,
        dependent=dependent,
    )
    return Planned(spec, rope_ctas(heads, kv_heads, tokens))


def rope_chunk_kernel(
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    *,
    bias: bool,
    norm: bool,
    norm_of_all_heads: bool,
    dependent: bool,
) -> Planned:
    """The spec of the kernel of `make_rope_chunk`; `rope_ctas` is the grid of a launch."""
    spec = kernel_spec(
        "rope_chunk",
        make_rope_chunk,
        RopeChunkArguments,
        THREADS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        eps=eps,
        bias=bias,
        norm=norm,
        norm_of_all_heads=norm_of_all_heads,
        dependent=dependent,
    )
    return Planned(spec, 0)
