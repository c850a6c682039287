"""Float16 tiles to FP8 tiles: x of the FP8 GEMM, from kernels that write float16.

Eight lanes take a token's group of 128: two rows of 128 bytes of the source, one of the result. The two orders of K
match: of a half of 64, words 4 i to 4 i + 3 of the result's chunk are K 16 t + 4 i to 16 t + 4 i + 3 for t = 0 to 3, as
are the words of the source's chunks 2 i and 2 i + 1. So a lane reads two chunks and writes one.

Cost model: 2 bytes read and 1.03 written per element.
"""

from typing import Any, NamedTuple

from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.fp8_activations import group_scale
from numba_atomflow.ops.cuda.runtime.spec import NUMBER, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32, u32

THREADS = 256
_CTA_TOKENS = THREADS // 8  # of one K block


class QuantizeTilesArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        x: tiled activations in float16.
        y: tiled activations in FP8.
        tokens: that are quantized: a multiple of 8.
    """

    x: U32
    y: U32
    tokens: NUMBER


def make_quantize_tiles(x: ActivationTiles, y: ActivationTiles, *, dependent: bool = False) -> Any:
    """Kernel (`QuantizeTilesArguments`). Launch: `quantize_tiles_ctas` CTAs of `THREADS` threads, no shared memory."""
    if x.blocks != 2 * y.blocks or (x.bits, x.weight_bits, y.bits, y.weight_bits) != (16, 8, 8, 8):
        raise ValueError(f"{x} cannot be quantized to {y}")
    blocks, x_block_words, y_block_words = y.blocks, x.block_words, y.block_words
    scales_start, scale_pitch = y.scales_start, y.tokens

    @ptx.kernel(THREADS, 1)
    def quantize_tiles(io):
        values = cuda.local.array(16, float32)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        chunk, place = cuda.threadIdx.x & 7, cuda.threadIdx.x >> 3
        block = cuda.blockIdx.x % blocks
        token = cuda.blockIdx.x // blocks * _CTA_TOKENS + place
        inside = token < io.tokens
        row = min(token, io.tokens - 1)
        swizzle = row & 7
        half, pair = chunk >> 2, (chunk & 3) * 2
        start = (2 * block + half) * x_block_words + row * BLOCK_WORDS
        for c in range(2):
            words = ptx.load_16(io.x, start + ((pair + c) ^ swizzle) * 4)
            for t in range(4):
                values[4 * t + 2 * c], values[4 * t + 2 * c + 1] = ptx.unpack_f16x2(words[t])
        largest = f32(0.0)
        for i in range(16):
            largest = ptx.max_f32(largest, abs(values[i]))
        for distance in (1, 2, 4):
            largest = ptx.max_f32(largest, ptx.shuffle_xor_f32(largest, distance))
        scale, factor = group_scale(largest)
        if inside:
            if chunk == 0:
                io.y[scales_start + block * scale_pitch + token] = ptx.f32_bits(scale)
            ptx.store_16(
                io.y,
                block * y_block_words + token * BLOCK_WORDS + (chunk ^ swizzle) * 4,
                u32(codes_of(values, 0, factor)),
                u32(codes_of(values, 4, factor)),
                u32(codes_of(values, 8, factor)),
                u32(codes_of(values, 12, factor)),
            )

    return quantize_tiles


@ptx.device_function
def codes_of(values, first, factor):
    """Four values as a word of codes."""
    return ptx.pack_e4m3x4(
        values[first] * factor, values[first + 1] * factor, values[first + 2] * factor, values[first + 3] * factor
    )


def quantize_tiles_ctas(y: ActivationTiles, tokens: int) -> int:
    """CTAs of a launch."""
    return y.blocks * -(-tokens // _CTA_TOKENS)


def quantize_tiles_kernel(name: str, x: ActivationTiles, y: ActivationTiles, *, dependent: bool) -> Planned:
    """The spec of the kernel of `make_quantize_tiles`. Its grid depends on the number of tokens."""
    spec = kernel_spec(name, make_quantize_tiles, QuantizeTilesArguments, THREADS, x=x, y=y, dependent=dependent)
    return Planned(spec, 0)
