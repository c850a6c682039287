"""RMSNorm of many tokens, written as the tiled activations that a GEMM multiplies (`layout/activations.py`).

A CTA has a token and keeps it in registers between the sum of squares and the scaling. A lane has two neighbouring
16-byte chunks of a K block, which are four times 4 elements along K: so it reads and writes 16 bytes at a time.

Cost model: 4 bytes read (from L2, where the kernel before left them) and 2 written per element, at 5.5 TB/s: 7 us for
2,048 tokens of 3,072. The instructions take 3 us: some 120 for 16 elements. Launch: a CTA for each token.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.spec import F32, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32, i32
from numba_atomflow.ops.cuda.token.rms_norm_fp8 import make_rms_norm_fp8, rms_norm_fp8_threads

_MAX_THREADS = 256
_VECTORS, _VECTOR_ELEMENTS = 4, 4  # of a thread in a K block: what two chunks are along K
_BLOCK_THREADS = 4  # of a K block
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
    return min(_MAX_THREADS, -(-x.blocks * _BLOCK_THREADS // 32) * 32)


def make_rms_norm_tiles(x: ActivationTiles, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`RmsNormTilesArguments`): token i is CTA i's. K is even; its padding is written as zeros.

    Launch: a CTA of `rms_norm_tiles_threads(x)` threads for each token, at most `x.tokens`; no shared memory.
    """
    if x.bits != 16 or x.in_features % 2:
        raise ValueError(f"RMSNorm to {x.bits} bits of {x.in_features} elements; it takes float16 and an even number")
    threads = rms_norm_tiles_threads(x)
    warps, blocks, in_features = threads // 32, x.blocks, x.in_features
    turns, turn_blocks = -(-blocks * _BLOCK_THREADS // threads), threads // _BLOCK_THREADS
    elements = turns * _VECTORS * _VECTOR_ELEMENTS  # of a thread
    inverse_width, epsilon = f32(1.0 / in_features), f32(eps)
    chunk_index, step = x.make_chunk_index(), 2 * x.chunk_step
    whole = in_features == blocks * x.block_elements and blocks == turns * turn_blocks  # all threads have elements
    load_vector = _make_load_vector(in_features, whole=whole)

    @ptx.device_function
    def load(array, start, block, chunk, values):
        for turn in range(turns):
            _, word = chunk_index(i32(0), i32(block + turn * turn_blocks), chunk)
            for v in range(_VECTORS):
                load_vector(array, start, i32(2 * word + v * step), values, (turn * _VECTORS + v) * _VECTOR_ELEMENTS)

    @ptx.kernel(threads, 1)
    def rms_norm_tiles(io):
        sums = cuda.shared.array(warps, float32)
        values = cuda.local.array(elements, float32)
        weights = cuda.local.array(elements, float32)
        thread, token = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        block, chunk = thread >> 2, (thread & 3) * 2  # `_BLOCK_THREADS` is 4
        load(io.norm_weight, 0, block, chunk, weights)  # no kernel writes them
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        load(io.residual, token * in_features, block, chunk, values)
        squares = _ZERO
        for i in range(elements):
            squares += values[i] * values[i]
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            sums[thread >> 5] = squares
        cuda.syncthreads()
        squares = _ZERO
        for i in range(warps):
            squares += sums[i]
        factor = ptx.rsqrt(squares * inverse_width + epsilon)
        for i in range(elements):
            values[i] = values[i] * factor * weights[i]
        for turn in range(turns):
            place = i32(block + turn * turn_blocks)
            if whole or place < blocks:
                for half in range(2):  # of a vector: one of the two chunks
                    at, _ = chunk_index(token, place, i32(chunk + half))
                    first = turn * _VECTORS * _VECTOR_ELEMENTS + 2 * half
                    a, b = (
                        ptx.pack_f16x2(values[first], values[first + 1]),
                        ptx.pack_f16x2(values[first + 4], values[first + 5]),
                    )
                    c, d = (
                        ptx.pack_f16x2(values[first + 8], values[first + 9]),
                        ptx.pack_f16x2(values[first + 12], values[first + 13]),
                    )
                    ptx.store_16(io.x, at, a, b, c, d)

    return rms_norm_tiles


def _make_load_vector(in_features: int, *, whole: bool) -> Any:
    """Device function (array, start, k, values, first): elements `start` + k to `start` + k + 3 into `values` from
    `first` on; 0 for those beyond K. `whole`: there are none.
    """
    aligned = in_features % _VECTOR_ELEMENTS == 0

    @ptx.device_function
    def load_vector(array, start, k, values, first):
        a, b, c, d = _ZERO, _ZERO, _ZERO, _ZERO
        if aligned:
            if whole or k < in_features:
                a, b, c, d = ptx.load_f32x4(array, start + k)
        else:
            if k < in_features:
                a, b = ptx.load_f32x2(array, start + k)
            if k + 2 < in_features:
                c, d = ptx.load_f32x2(array, start + k + 2)
        values[first], values[first + 1], values[first + 2], values[first + 3] = a, b, c, d

    return load_vector


def rms_norm_tiles_kernel(name: str, x: ActivationTiles, eps: float, dependent: bool) -> Planned:
    """The spec of the kernel of `make_rms_norm_tiles`, which serves any number of tokens up to `x.tokens`.

    FP8 tiles: of `rms_norm_fp8.make_rms_norm_fp8`.
    """
    make, threads = make_rms_norm_tiles, rms_norm_tiles_threads(x)
    if x.bits == 8:
        make, threads = make_rms_norm_fp8, rms_norm_fp8_threads(x)
    spec = kernel_spec(name, make, RmsNormTilesArguments, threads, x=x, eps=eps, dependent=dependent)
    return Planned(spec, 0)
