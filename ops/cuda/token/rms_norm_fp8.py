"""RMSNorm of many tokens, written as the tiled FP8 activations that an FP8 GEMM multiplies.

As `rms_norm.py`, but a lane's word is four codes: a warp's 32 words are one K block, and so a group with one scale.
Nothing is rounded between the norm and the codes. Cost model: 4 bytes read and 1.03 written per element.
"""

from typing import Any

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.fp8_activations import group_scale
from numba_atomflow.ops.cuda.scalars import f32

_MAX_WARPS = 8
_BLOCKS_PER_WARP = 2  # where there are few K blocks
_ZERO = f32(0.0)


def rms_norm_fp8_threads(x: ActivationTiles) -> int:
    """Threads of a CTA."""
    return 32 * min(_MAX_WARPS, -(-x.blocks // _BLOCKS_PER_WARP))


def make_rms_norm_fp8(x: ActivationTiles, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`RmsNormTilesArguments`): token i is CTA i's. K is a multiple of 4; its padding is written as zeros.

    Launch: a CTA of `rms_norm_fp8_threads(x)` threads for each token, at most `x.tokens`; no shared memory.
    """
    if x.bits != 8 or x.in_features % 4:
        raise ValueError(f"RMSNorm to {x.bits} bits of {x.in_features} elements; it takes FP8 and a multiple of 4")
    threads = rms_norm_fp8_threads(x)
    warps, blocks, in_features = threads // 32, x.blocks, x.in_features
    turns = -(-blocks // warps)
    elements = 4 * turns  # of a thread
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)
    scales_start, scale_pitch = x.scales_start, x.tokens
    word_index = x.make_word_index()

    @ptx.device_function
    def load(array, start, k, values, first):
        a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
        if k < in_features:
            a, b, c, d = ptx.load_f32x4(array, start + k)
        values[first], values[first + 1], values[first + 2], values[first + 3] = a, b, c, d

    @ptx.kernel(threads, 1)
    def rms_norm_fp8(io):
        sums = cuda.shared.array(_MAX_WARPS, float32)
        values = cuda.local.array(elements, float32)
        weights = cuda.local.array(elements, float32)
        lane, warp, token = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockIdx.x
        for i in range(turns):  # no kernel writes them
            load(io.norm_weight, 0, ((i * warps + warp) * BLOCK_WORDS + lane) * 4, weights, 4 * i)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        squares = _ZERO
        for i in range(turns):
            load(io.residual, token * in_features, ((i * warps + warp) * BLOCK_WORDS + lane) * 4, values, 4 * i)
            for j in range(4):
                squares += values[4 * i + j] * values[4 * i + j]
        squares = ptx.warp_sum(squares)
        if lane == 0:
            sums[warp] = squares
        cuda.syncthreads()
        squares = _ZERO
        for i in range(warps):
            squares += sums[i]
        norm = ptx.rsqrt(squares * inverse_width + epsilon)
        for i in range(turns):
            block = i * warps + warp
            largest = _ZERO
            for j in range(4):
                values[4 * i + j] *= norm * weights[4 * i + j]
                largest = ptx.max_f32(largest, abs(values[4 * i + j]))
            scale, factor = group_scale(ptx.warp_max(largest))
            if block < blocks:
                if lane == 0:
                    io.x[scales_start + block * scale_pitch + token] = ptx.f32_bits(scale)
                io.x[word_index(token, block * BLOCK_WORDS + lane)] = ptx.pack_e4m3x4(
                    values[4 * i] * factor,
                    values[4 * i + 1] * factor,
                    values[4 * i + 2] * factor,
                    values[4 * i + 3] * factor,
                )

    return rms_norm_fp8
