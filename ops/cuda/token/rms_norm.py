"""RMSNorm of many tokens, written as the tiled activations that a GEMM multiplies (`layout/activations.py`).

A CTA has a token and keeps it in registers between the sum of squares and the scaling; a warp has whole K blocks, a
lane one 32-bit word of each, so that reads are 256 contiguous bytes and writes 128. Cost model: 4 bytes read and 2
written per element: 12 us for 2,048 tokens of 3,072 at 3 TB/s. Launch: a CTA for each token.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.runtime.spec import F32, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.cuda.token.rms_norm_fp8 import make_rms_norm_fp8, rms_norm_fp8_threads

_MAX_WARPS = 8
_BLOCKS_PER_WARP = 4  # where there are few K blocks
_ZERO = f32(0.0)


class RmsNormTilesArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        residual: [tokens, K].
        norm_weight: [K].
        x: tiled activations.
    """

    residual: F32
    norm_weight: F32
    x: U32


def rms_norm_tiles_threads(x: ActivationTiles) -> int:
    """Threads of a CTA."""
    return 32 * min(_MAX_WARPS, -(-x.blocks // _BLOCKS_PER_WARP))


def make_rms_norm_tiles(x: ActivationTiles, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`RmsNormTilesArguments`): token i is CTA i's. K is even; its padding is written as zeros.

    Launch: a CTA of `rms_norm_tiles_threads(x)` threads for each token, at most `x.tokens`; no shared memory.
    """
    if x.bits != 16 or x.in_features % 2:
        raise ValueError(f"RMSNorm to {x.bits} bits of {x.in_features} elements; it takes float16 and an even number")
    threads = rms_norm_tiles_threads(x)
    warps, blocks, in_features = threads // 32, x.blocks, x.in_features
    turns = -(-blocks // warps)
    elements = 2 * turns  # of a thread
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)
    word_index = x.make_word_index()

    @ptx.kernel(threads, 1)
    def rms_norm_tiles(io):
        sums = cuda.shared.array(_MAX_WARPS, float32)
        values = cuda.local.array(elements, float32)
        weights = cuda.local.array(elements, float32)
        lane, warp, token = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5, cuda.blockIdx.x
        for i in range(turns):  # no kernel writes them
            k = ((i * warps + warp) * BLOCK_WORDS + lane) * 2
            weights[2 * i], weights[2 * i + 1] = _ZERO, _ZERO
            if k < in_features:
                weights[2 * i], weights[2 * i + 1] = ptx.load_f32x2(io.norm_weight, k)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        squares = _ZERO
        for i in range(turns):
            k = ((i * warps + warp) * BLOCK_WORDS + lane) * 2
            values[2 * i], values[2 * i + 1] = _ZERO, _ZERO
            if k < in_features:
                values[2 * i], values[2 * i + 1] = ptx.load_f32x2(io.residual, token * in_features + k)
            squares += values[2 * i] * values[2 * i] + values[2 * i + 1] * values[2 * i + 1]
        squares = ptx.warp_sum(squares)
        if lane == 0:
            sums[warp] = squares
        cuda.syncthreads()
        squares = _ZERO
        for i in range(warps):
            squares += sums[i]
        factor = ptx.rsqrt(squares * inverse_width + epsilon)
        for i in range(turns):
            block = i * warps + warp
            if block < blocks:
                low, high = values[2 * i] * factor * weights[2 * i], values[2 * i + 1] * factor * weights[2 * i + 1]
                io.x[word_index(token, block * BLOCK_WORDS + lane)] = ptx.pack_f16x2(low, high)

    return rms_norm_tiles


def rms_norm_tiles_kernel(name: str, x: ActivationTiles, eps: float, dependent: bool) -> Planned:
    """The spec of the kernel of `make_rms_norm_tiles`, which serves any number of tokens up to `x.tokens`.

    FP8 tiles: of `rms_norm_fp8.make_rms_norm_fp8`.
    """
    make, threads = make_rms_norm_tiles, rms_norm_tiles_threads(x)
    if x.bits == 8:
        make, threads = make_rms_norm_fp8, rms_norm_fp8_threads(x)
    spec = kernel_spec(name, make, RmsNormTilesArguments, threads, x=x, eps=eps, dependent=dependent)
    return Planned(spec, 0)
