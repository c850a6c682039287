"""RMSNorm of many tokens, written as the tiled activations that a GEMM multiplies (`layout/activations.py`).

Cost model: 4 bytes read (from L2, where the kernel before left them) and 2 written per element, at 5.5 TB/s: 7 us for
2,048 tokens of 3,072. The instructions take 3 us: some 190 for 16 elements. Launch: a CTA for each token.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.spec import F32, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32, u32
from numba_atomflow.ops.cuda.token.rms_norm_elements import THREAD_ELEMENTS, make_normed_elements, norm_shape
from numba_atomflow.ops.cuda.token.rms_norm_fp8 import make_rms_norm_fp8


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
    return norm_shape(x).threads


def make_rms_norm_tiles(x: ActivationTiles, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`RmsNormTilesArguments`): token i is CTA i's. K is even; its padding is written as zeros.

    Launch: a CTA of `rms_norm_tiles_threads(x)` threads for each token, at most `x.tokens`; no shared memory.
    """
    if x.bits != 16 or x.in_features % 2:
        raise ValueError(f"RMSNorm to {x.bits} bits of {x.in_features} elements; it takes float16 and an even number")
    threads, block_threads, chunks, turns, turn_blocks, whole = norm_shape(x)
    blocks, count = x.blocks, turns * THREAD_ELEMENTS
    normed, chunk_index = make_normed_elements(x, eps, dependent), x.make_chunk_index()

    @ptx.kernel(threads, 1)
    def rms_norm_tiles(io):
        values = cuda.local.array(count, float32)
        thread, token = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        block, chunk = i32(u32(thread) // u32(block_threads)), i32(u32(thread) % u32(block_threads)) * chunks
        normed(io, token, block, chunk, values)
        for turn in range(turns):
            place = i32(block + turn * turn_blocks)
            if whole or place < blocks:
                for half in range(chunks):  # of a vector: one of the two chunks
                    at, _ = chunk_index(token, place, i32(chunk + half))
                    i = turn * THREAD_ELEMENTS + 2 * half
                    a, b = ptx.pack_f16x2(values[i], values[i + 1]), ptx.pack_f16x2(values[i + 4], values[i + 5])
                    c, d = ptx.pack_f16x2(values[i + 8], values[i + 9]), ptx.pack_f16x2(values[i + 12], values[i + 13])
                    ptx.store_16(io.x, at, a, b, c, d)

    return rms_norm_tiles


def rms_norm_tiles_kernel(name: str, x: ActivationTiles, eps: float, dependent: bool) -> Planned:
    """The spec of the kernel of `make_rms_norm_tiles`, which serves any number of tokens up to `x.tokens`.

    FP8 tiles: of `rms_norm_fp8.make_rms_norm_fp8`.
    """
    make, threads = make_rms_norm_fp8 if x.bits == 8 else make_rms_norm_tiles, rms_norm_tiles_threads(x)
    spec = kernel_spec(name, make, RmsNormTilesArguments, threads, x=x, eps=eps, dependent=dependent)
    return Planned(spec, 0)
