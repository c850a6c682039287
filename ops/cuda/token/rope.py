"""Bias, norm of each head, rotation, and the KV cache: for models where the projection's epilogue cannot do it all.

Without a norm of heads the two elements that RoPE turns meet in one lane, and the epilogue of the QKV projection does
this work. Qwen3 norms each head first, which takes all of its elements; here a warp has a head. Qwen2's bias is added
here too. Cost model: a launch (2-3 us); 4 bytes read and 2 written per row of q, k and v.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemv.mainloop import rotated
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U16, Planned, kernel_spec

THREADS = 128
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def rope_blocks(heads: int, kv_heads: int, columns: int) -> int:
    """Blocks of the kernel: a warp for each head of q, k and v of each token."""
    return -(-columns * (heads + 2 * kv_heads) * 32 // THREADS)


def make_rope(
    heads: int,
    kv_heads: int,
    head_dim: int,
    columns: int,
    eps: float,
    bias: bool,
    norm: bool,
    *,
    dependent: bool = False,
) -> Any:
    """Kernel (qkv float32 [columns, (heads + 2 kv_heads) * head_dim], bias float32 [(heads + 2 kv_heads) * head_dim],
    q_norm and k_norm float32 [head_dim], position int64 [1], cosines and sines float32 [positions, head_dim / 2], q
    uint16 bits of float16 [columns, heads * head_dim], keys and values uint16 bits of float16 [positions, kv_heads *
    head_dim]). What a model does not have is not read. Column t is the token at position[0] + t.

    Launch: `rope_blocks` blocks of `THREADS` threads, no shared memory.
    """
    half, all_heads = head_dim // 2, heads + 2 * kv_heads
    pairs = -(-half // 32)  # per lane
    inverse_width, epsilon = np.float32(1.0 / head_dim), np.float32(eps)

    @ptx.kernel(THREADS, 1)
    def rope(qkv, biases, q_norm, k_norm, position, cosines, sines, q, keys, values):
        lows = cuda.local.array(pairs, float32)
        highs = cuda.local.array(pairs, float32)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        index = (cuda.blockIdx.x * THREADS + cuda.threadIdx.x) >> 5
        lane = cuda.threadIdx.x & 31
        live = index < columns * all_heads
        column, head = min(index // all_heads, columns - 1), index % all_heads
        start = (column * all_heads + head) * head_dim
        squares = _ZERO
        for p in range(pairs):
            i = lane + 32 * p
            lows[p], highs[p] = _ZERO, _ZERO
            if i < half:
                lows[p], highs[p] = qkv[start + i], qkv[start + half + i]
                if bias:
                    lows[p] += biases[head * head_dim + i]
                    highs[p] += biases[head * head_dim + half + i]
            squares += lows[p] * lows[p] + highs[p] * highs[p]
        if norm:
            squares = ptx.warp_sum(squares)
        factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
        slot = position[0] + column
        for p in range(pairs):
            i = lane + 32 * p
            if i < half and live:
                low, high = lows[p], highs[p]
                if head < heads + kv_heads:
                    if norm:
                        weight = q_norm if head < heads else k_norm
                        low *= factor * weight[i]
                        high *= factor * weight[half + i]
                    cosine, sine = cosines[slot * half + i], sines[slot * half + i]
                    low, high = rotated(low, high, cosine, sine)
                low_bits, high_bits = np.uint16(ptx.f16_bits(low)), np.uint16(ptx.f16_bits(high))
                if head < heads:
                    at = (column * heads + head) * head_dim + i
                    q[at], q[at + half] = low_bits, high_bits
                elif head < heads + kv_heads:
                    at = (slot * kv_heads + head - heads) * head_dim + i
                    keys[at], keys[at + half] = low_bits, high_bits
                else:
                    at = (slot * kv_heads + head - heads - kv_heads) * head_dim + i
                    values[at], values[at + half] = low_bits, high_bits

    return rope


def rope_kernel(
    heads: int, kv_heads: int, head_dim: int, tokens: int, eps: float, *, bias: bool, norm: bool, dependent: bool
) -> Planned:
    """The spec of the kernel of `make_rope`."""
    spec = kernel_spec(
        f"rope_x{tokens}",
        make_rope,
        (F32, F32, F32, F32, I64, F32, F32, U16, U16, U16),
        THREADS,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        columns=tokens,
        eps=eps,
        bias=bias,
        norm=norm,
        dependent=dependent,
    )
    return Planned(spec, rope_blocks(heads, kv_heads, tokens))
