"""The order of prepacked weights, in NumPy: sizes, offsets and the inverse."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from kernel_cases import fp16_weights, generator, weights

from numba_atomflow.ops.cuda.layout.weights import (
    GROUP_WORDS,
    TILE_ROWS,
    PrepackedLayout,
    prepack_fp16_reference,
    prepack_reference,
    unpack_reference,
)
from numba_atomflow.ops.formats import FP8_E4M3, FP8_E4M3_BITS, FP16

WIDTHS = (64, 128, 130, 576, 3072, 8192)
K_TILES = (0, 1, 3, 4, 8, 100)


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("k_tile", K_TILES)
@pytest.mark.parametrize("width", WIDTHS)
def test_regions_are_contiguous_and_fill_the_tile(width: int, k_tile: int, float16: bool) -> None:
    layout = PrepackedLayout(40, width, format=FP16 if float16 else FP8_E4M3_BITS, k_tile=k_tile)
    assert (layout.k_tiles - 1) * layout.k_tile_groups + layout.last_k_tile_groups == layout.groups
    assert 1 <= layout.last_k_tile_groups <= layout.k_tile_groups
    regions = list(layout.regions())
    per_k_tile = 2 if layout.split_rows else 1
    assert len(regions) == layout.k_tiles * per_k_tile
    end = 0
    for index, (groups, half, codes, scales) in enumerate(regions):
        number, part = divmod(index, per_k_tile)
        count = groups.stop - groups.start
        assert count == (layout.k_tile_groups if number < layout.k_tiles - 1 else layout.last_k_tile_groups)
        assert groups.start == number * layout.k_tile_groups
        assert (half.start, half.stop) == ((part, part + 1) if per_k_tile == 2 else (0, 2))
        assert codes.stop - codes.start == count * GROUP_WORDS // per_k_tile
        assert codes.start % 4 == 0, "loads of 16 bytes would not be aligned"
        assert scales.start == codes.stop
        assert scales.stop - scales.start == (0 if float16 else count * TILE_ROWS // per_k_tile)
        if part == 0:
            assert codes.start == number * layout.k_tile_words
            assert codes.start % 32 == 0, "a bulk copy would not be aligned to 128 bytes"
            assert 0 <= codes.start - end < 32, "a k-tile overlaps the previous one, or leaves a gap"
        else:
            assert codes.start == end
            assert count < 4 or count % 4 or codes.start % 32 == 0, "a copy of half a k-tile would not be aligned"
        end = scales.stop
    assert number * layout.k_tile_words + layout.last_k_tile_words == layout.tile_words
    assert 0 <= layout.tile_words - end < 32
    assert layout.words == 3 * layout.tile_words


@pytest.mark.parametrize(
    ("width", "k_tiles", "last_groups", "words"),
    [(576, 2, 1, 2112 + 544), (3072, 6, 4, 6 * 2112), (8192, 16, 4, 16 * 2112), (130, 1, 2, 1056), (64, 1, 1, 544)],
)
def test_sizes_of_k_tiles_of_four_groups(width: int, k_tiles: int, last_groups: int, words: int) -> None:
    layout = PrepackedLayout(16, width, format=FP8_E4M3_BITS, k_tile=4)
    assert (layout.k_tiles, layout.last_k_tile_groups, layout.tile_words) == (k_tiles, last_groups, words)


@pytest.mark.parametrize("k_tile", K_TILES)
@pytest.mark.parametrize("width", WIDTHS)
def test_unpacking_inverts_prepacking(width: int, k_tile: int) -> None:
    layout = PrepackedLayout(40, width, half=20, format=FP8_E4M3 if k_tile == 4 else FP8_E4M3_BITS, k_tile=k_tile)
    codes, scales = weights(layout, generator(width, k_tile))
    back_codes, back_scales = unpack_reference(prepack_reference(codes, scales, layout), layout)
    np.testing.assert_array_equal(back_codes, codes)
    np.testing.assert_array_equal(back_scales, scales)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_k_tile_is_the_tile_of_a_narrower_projection(width: int) -> None:
    """A k-tile is a tile of a projection with as small a K, padding included."""
    layout = PrepackedLayout(16, width, format=FP8_E4M3_BITS, k_tile=4)
    codes, scales = weights(layout, generator(width))
    words = prepack_reference(codes, scales, layout)
    for number, (groups, _, _, _) in enumerate(list(layout.regions())[::2]):
        columns = slice(groups.start * 128, min(groups.stop * 128, width))
        alone = PrepackedLayout(16, columns.stop - columns.start, format=FP8_E4M3_BITS, k_tile=4)
        expected = prepack_reference(codes[:, columns], scales[:, groups], alone)
        start = number * layout.k_tile_words
        np.testing.assert_array_equal(words[start : start + alone.words], expected)


def test_half_a_k_tile_has_8_rows() -> None:
    """The same half of two adjacent k-tiles is a k-tile whose rows 8-15 are rows 0-7 over the second one's K."""
    layout = PrepackedLayout(16, 1024, format=FP8_E4M3_BITS, k_tile=4)
    codes, scales = weights(layout, generator(7))
    first, second = prepack_reference(codes, scales, layout).reshape(2, 2, -1).transpose(1, 0, 2)
    for rows, half_tiles in ((slice(0, 8), first), (slice(8, 16), second)):
        stacked = np.concatenate(np.split(codes[rows], 2, axis=1)), np.concatenate(np.split(scales[rows], 2, axis=1))
        expected = prepack_reference(*stacked, PrepackedLayout(16, 512, format=FP8_E4M3_BITS, k_tile=4))
        np.testing.assert_array_equal(half_tiles.reshape(-1), expected)


def test_fp16_has_one_order_whatever_the_k_tile() -> None:
    """It has no scales between k-tiles, and its prepack kernel has no argument for them."""
    layout = PrepackedLayout(37, 576, format=FP16)
    values = fp16_weights(layout, generator(37))
    words = prepack_fp16_reference(values, layout)
    for k_tile in K_TILES:
        tiled = replace(layout, k_tile=k_tile)
        assert tiled.words == layout.words
        np.testing.assert_array_equal(words, prepack_fp16_reference(values, tiled))
