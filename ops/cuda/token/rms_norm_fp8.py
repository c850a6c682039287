"""RMSNorm of many tokens, written as the tiled FP8 activations that an FP8 GEMM multiplies.

As `rms_norm.py`, but a thread's chunk of 16 bytes is 16 codes: 8 threads have a K block, which is a group with one
scale. Nothing is rounded between the norm and the codes. Cost model: 4 bytes read and 1.03 written per element.
"""

from typing import Any

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.fp8_activations import group_scale
from numba_atomflow.ops.cuda.scalars import f32, i32, u32
from numba_atomflow.ops.cuda.token.quantize_tiles import codes_of
from numba_atomflow.ops.cuda.token.rms_norm_elements import THREAD_ELEMENTS, make_normed_elements, norm_shape

_GROUP_THREADS = 8
_ZERO = f32(0.0)


def make_rms_norm_fp8(x: ActivationTiles, eps: float, *, dependent: bool = False) -> Any:
    """Kernel (`RmsNormTilesArguments`): token i is CTA i's. K is a multiple of 4; its padding is written as zeros.

    Launch: a CTA of `norm_shape(x).threads` threads for each token, at most `x.tokens`; no shared memory.
    """
    if x.bits != 8 or x.in_features % 4:
        raise ValueError(f"RMSNorm to {x.bits} bits of {x.in_features} elements; it takes FP8 and a multiple of 4")
    threads, _, _, turns, turn_blocks, whole = norm_shape(x)
    blocks, count, scales_start, scale_pitch = x.blocks, turns * THREAD_ELEMENTS, x.scales_start, x.tokens
    normed, chunk_index = make_normed_elements(x, eps, dependent), x.make_chunk_index()

    @ptx.kernel(threads, 1)
    def rms_norm_fp8(io):
        values = cuda.local.array(count, float32)
        thread, token = i32(cuda.threadIdx.x), i32(cuda.blockIdx.x)
        block, chunk = i32(u32(thread) // u32(_GROUP_THREADS)), i32(u32(thread) % u32(_GROUP_THREADS))
        normed(io, token, block, chunk, values)
        for turn in range(turns):
            place, first = i32(block + turn * turn_blocks), turn * THREAD_ELEMENTS
            largest = _ZERO
            for i in range(THREAD_ELEMENTS):
                largest = ptx.max_f32(largest, abs(values[first + i]))
            for distance in (1, 2, 4):
                largest = ptx.max_f32(largest, ptx.shuffle_xor_f32(largest, distance))
            scale, factor = group_scale(largest)
            if whole or place < blocks:
                if chunk == 0:
                    io.x[scales_start + place * scale_pitch + token] = ptx.f32_bits(scale)
                at, _ = chunk_index(token, place, chunk)
                a, b = u32(codes_of(values, first, factor)), u32(codes_of(values, first + 4, factor))
                c, d = u32(codes_of(values, first + 8, factor)), u32(codes_of(values, first + 12, factor))
                ptx.store_16(io.x, at, a, b, c, d)

    return rms_norm_fp8
