"""Kernels that prepack weights when a model is loaded: from the checkpoint's order to that of `layout/weights.py`.

One thread per word of the result. One kernel serves all layouts of a format, because each runs once. Cost model: the
weights read and written once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.converters import CONVERTERS
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER, U8, U16, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32, u32

THREADS = 256


class PrepackArguments(NamedTuple):
    """FP8 weights.

    Attributes:
        codes: [N * K]. scales: [N * groups]. words: [layout.words], the result.
        half, k_tile_groups: of the layout.
        row_halves: halves of a tile's rows per region: 1 where rows are split, else 2.
    """

    codes: U8
    scales: F32
    words: U32
    out_features: NUMBER
    in_features: NUMBER
    half: NUMBER
    k_tile_groups: NUMBER
    row_halves: NUMBER


class PrepackFp16Arguments(NamedTuple):
    """Float16 weights.

    Attributes:
        weights: [N * K]. words: [layout.words], the result.
    """

    weights: U16
    words: U32
    out_features: NUMBER
    in_features: NUMBER


def make_prepack(converter: str) -> Any:
    """Kernel (`PrepackArguments`) for the byte order of a converter.

    Launch: `prepack_ctas(layout)` CTAs of `THREADS` threads, no shared memory.
    """
    order_0, order_1, order_2, order_3 = CONVERTERS[converter].byte_order
    factor = f32(CONVERTERS[converter].scale_factor)

    @ptx.device_function
    def source_row(tile, row, rows, half, section_tiles):
        if half == 0:
            source = tile * 16 + row
            return source if source < rows else -1
        unit = tile % section_tiles * 8 + row % 8
        source = tile // section_tiles * (2 * half) + row // 8 * half + unit
        return source if unit < half else -1

    @ptx.device_function
    def code(codes, row, k, in_features):
        return u32(codes[row * in_features + k]) if k < in_features else u32(0)

    @ptx.kernel(THREADS, 1)
    def prepack(io):
        in_features, k_tile_groups, row_halves = io.in_features, io.k_tile_groups, io.row_halves
        groups = (in_features + 127) // 128
        # 528 words hold 16 rows of a group (GROUP_WORDS, and 16 scales), 264 its 8 rows (HALF_GROUP_WORDS).
        k_tile_words = (k_tile_groups * 528 + 31) // 32 * 32
        whole_k_tiles = (groups - 1) // k_tile_groups
        tile_words = whole_k_tiles * k_tile_words + ((groups - whole_k_tiles * k_tile_groups) * 528 + 31) // 32 * 32
        section_tiles = max((io.half + 7) // 8, 1)
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= len(io.words):
            return
        tile = index // tile_words
        k_tile, word = index % tile_words // k_tile_words, index % tile_words % k_tile_words
        first_group = k_tile * k_tile_groups
        count = min(k_tile_groups, groups - first_group)
        value = u32(0)
        if word < count * 528:  # else padding
            # In a region, blocks of 128 words, and scales, alternate between its halves of the rows.
            region, word = word // (count * 264 * row_halves), word % (count * 264 * row_halves)
            codes_end = count * 256 * row_halves
            if word < codes_end:
                block = word // 128
                row = (region + block % row_halves) * 8 + word % 128 // 16
                row = source_row(tile, row, io.out_features, io.half, section_tiles)
                k = first_group * 128 + block // row_halves * 64 + word % 16 * 4
                if row >= 0:
                    value = u32(
                        code(io.codes, row, k + order_0, in_features)
                        | code(io.codes, row, k + order_1, in_features) << 8
                        | code(io.codes, row, k + order_2, in_features) << 16
                        | code(io.codes, row, k + order_3, in_features) << 24
                    )
            else:
                entry = word - codes_end
                row = (region + entry % row_halves) * 8 + entry // row_halves % 8
                row = source_row(tile, row, io.out_features, io.half, section_tiles)
                group = first_group + entry // (8 * row_halves)
                if row >= 0:
                    value = u32(ptx.f32_bits(io.scales[row * groups + group] * factor))
        io.words[index] = value

    return prepack


def make_prepack_fp16() -> Any:
    """Kernel (`PrepackFp16Arguments`). Launched as that of `make_prepack`."""

    @ptx.device_function
    def element(weights, row, k, rows, in_features):
        if row < rows and k < in_features:
            return u32(weights[row * in_features + k])
        return u32(0)

    @ptx.kernel(THREADS, 1)
    def prepack_fp16(io):
        tile_words = (io.in_features + 127) // 128 * 1024
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= len(io.words):
            return
        tile, word = index // tile_words, index % tile_words
        row = tile * 16 + word % 256 // 128 * 8 + word % 128 // 16
        k = word // 256 * 32 + word % 16 * 2
        low = element(io.weights, row, k, io.out_features, io.in_features)
        io.words[index] = u32(low | element(io.weights, row, k + 1, io.out_features, io.in_features) << 16)

    return prepack_fp16


def prepack_kernel(converter: str) -> Planned:
    """The kernel of `make_prepack`."""
    return Planned(kernel_spec("prepack", make_prepack, PrepackArguments, THREADS, converter=converter), 0)


def prepack_fp16_kernel() -> Planned:
    """The kernel of `make_prepack_fp16`."""
    return Planned(kernel_spec("prepack_fp16", make_prepack_fp16, PrepackFp16Arguments, THREADS), 0)


def prepack_ctas(layout: PrepackedLayout) -> int:
    """CTAs of a launch."""
    return -(-layout.words // THREADS)


def prepack_arguments(
    layout: PrepackedLayout, parts: Sequence[Any], words: Any
) -> PrepackArguments | PrepackFp16Arguments:
    """The arguments of the layout's prepack kernel.

    Args:
        parts: codes and scales, or float16 weights alone. words: the result.
    """
    if not layout.format.scaled:
        (weights,) = parts
        return PrepackFp16Arguments(weights, words, layout.out_features, layout.in_features)
    codes, scales = parts
    return PrepackArguments(
        codes,
        scales,
        words,
        out_features=layout.out_features,
        in_features=layout.in_features,
        half=layout.half,
        k_tile_groups=layout.k_tile_groups,
        row_halves=1 if layout.split_rows else 2,
    )
