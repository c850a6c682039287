"""The order of weights on the device, as far as NumPy tells it: sizes, places and the way back."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from kernel_cases import generator, halves, weights

from numba_atomflow.ops.cuda.fragments import (
    GROUP_WORDS,
    TILE_ROWS,
    FragmentLayout,
    from_fragments_reference,
    halves_to_fragments_reference,
    to_fragments_reference,
)

WIDTHS = (64, 128, 130, 576, 3072, 8192)
CHUNKS = (0, 1, 3, 4, 8, 100)


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_chunks_follow_each_other_and_fill_the_tile(width: int, chunk: int, float16: bool) -> None:
    layout = FragmentLayout(40, width, halves=float16, chunk=chunk)
    assert (layout.chunks - 1) * layout.chunk_groups + layout.last_chunk_groups == layout.groups
    assert 1 <= layout.last_chunk_groups <= layout.chunk_groups
    slices = list(layout.chunk_slices())
    assert len(slices) == layout.chunks
    end = 0
    for number, (groups, codes, scales) in enumerate(slices):
        count = groups.stop - groups.start
        assert count == (layout.chunk_groups if number < layout.chunks - 1 else layout.last_chunk_groups)
        assert groups.start == number * layout.chunk_groups
        assert codes.start == number * layout.chunk_words
        assert codes.start % 32 == 0, "a bulk copy would not be aligned to 128 bytes"
        assert codes.stop - codes.start == count * GROUP_WORDS
        assert scales.start == codes.stop
        assert scales.stop - scales.start == (0 if float16 else count * TILE_ROWS)
        assert 0 <= codes.start - end < 32, "a chunk stands over the one before, or far behind it"
        end = scales.stop
    assert slices[-1][1].start + layout.last_chunk_words == layout.tile_words
    assert 0 <= layout.tile_words - end < 32
    assert layout.words == 3 * layout.tile_words


@pytest.mark.parametrize(
    ("width", "chunks", "last_groups", "words"),
    [(576, 2, 1, 2112 + 544), (3072, 6, 4, 6 * 2112), (8192, 16, 4, 16 * 2112), (130, 1, 2, 1056), (64, 1, 1, 544)],
)
def test_sizes_of_chunks_of_four_groups(width: int, chunks: int, last_groups: int, words: int) -> None:
    layout = FragmentLayout(16, width, chunk=4)
    assert (layout.chunks, layout.last_chunk_groups, layout.tile_words) == (chunks, last_groups, words)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("width", WIDTHS)
def test_there_and_back(width: int, chunk: int) -> None:
    layout = FragmentLayout(40, width, half=20, hardware_fp8=chunk == 4, chunk=chunk)
    codes, scales = weights(layout, generator(width, chunk))
    back_codes, back_scales = from_fragments_reference(to_fragments_reference(codes, scales, layout), layout)
    np.testing.assert_array_equal(back_codes, codes)
    np.testing.assert_array_equal(back_scales, scales)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_chunk_is_the_tile_of_a_narrower_projection(width: int) -> None:
    """Whoever copies a chunk has what a tile with as few columns would be, padding included."""
    layout = FragmentLayout(16, width, chunk=4)
    codes, scales = weights(layout, generator(width))
    words = to_fragments_reference(codes, scales, layout)
    for number, (groups, _, _) in enumerate(layout.chunk_slices()):
        columns = slice(groups.start * 128, min(groups.stop * 128, width))
        alone = FragmentLayout(16, columns.stop - columns.start)
        expected = to_fragments_reference(codes[:, columns], scales[:, groups], alone)
        start = number * layout.chunk_words
        np.testing.assert_array_equal(words[start : start + alone.words], expected)


def test_halves_are_in_one_order_whatever_the_chunk() -> None:
    """They have no scales that could stand between chunks, and their repack kernel is not told of any."""
    layout = FragmentLayout(37, 576, halves=True)
    values = halves(layout, generator(37))
    words = halves_to_fragments_reference(values, layout)
    for chunk in CHUNKS:
        chunked = replace(layout, chunk=chunk)
        assert chunked.words == layout.words
        np.testing.assert_array_equal(words, halves_to_fragments_reference(values, chunked))
