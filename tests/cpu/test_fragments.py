"""The order of weights on the device, as far as NumPy tells it: sizes, places and the way back."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from kernel_cases import generator, halves, weights

from numba_atomflow.ops.cuda.layout.weights import (
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
def test_pieces_follow_each_other_and_fill_the_tile(width: int, chunk: int, float16: bool) -> None:
    layout = FragmentLayout(40, width, halves=float16, chunk=chunk)
    assert (layout.chunks - 1) * layout.chunk_groups + layout.last_chunk_groups == layout.groups
    assert 1 <= layout.last_chunk_groups <= layout.chunk_groups
    pieces = list(layout.pieces())
    per_chunk = 2 if layout.halves_apart else 1
    assert len(pieces) == layout.chunks * per_chunk
    end = 0
    for index, (groups, half, codes, scales) in enumerate(pieces):
        number, piece = divmod(index, per_chunk)
        count = groups.stop - groups.start
        assert count == (layout.chunk_groups if number < layout.chunks - 1 else layout.last_chunk_groups)
        assert groups.start == number * layout.chunk_groups
        assert (half.start, half.stop) == ((piece, piece + 1) if per_chunk == 2 else (0, 2))
        assert codes.stop - codes.start == count * GROUP_WORDS // per_chunk
        assert codes.start % 4 == 0, "loads of 16 bytes would not be aligned"
        assert scales.start == codes.stop
        assert scales.stop - scales.start == (0 if float16 else count * TILE_ROWS // per_chunk)
        if piece == 0:
            assert codes.start == number * layout.chunk_words
            assert codes.start % 32 == 0, "a bulk copy would not be aligned to 128 bytes"
            assert 0 <= codes.start - end < 32, "a chunk stands over the one before, or far behind it"
        else:
            assert codes.start == end
            assert count < 4 or count % 4 or codes.start % 32 == 0, "a copy of half a chunk would not be aligned"
        end = scales.stop
    assert number * layout.chunk_words + layout.last_chunk_words == layout.tile_words
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
    for number, (groups, _, _, _) in enumerate(list(layout.pieces())[::2]):
        columns = slice(groups.start * 128, min(groups.stop * 128, width))
        alone = FragmentLayout(16, columns.stop - columns.start, chunk=4)
        expected = to_fragments_reference(codes[:, columns], scales[:, groups], alone)
        start = number * layout.chunk_words
        np.testing.assert_array_equal(words[start : start + alone.words], expected)


def test_half_a_chunk_has_the_rows_of_half_a_tile() -> None:
    """Two of them, of neighbouring chunks, are a chunk whose rows 8-15 are rows 0-7 over the second one's columns."""
    layout = FragmentLayout(16, 1024, chunk=4)
    codes, scales = weights(layout, generator(7))
    first, second = to_fragments_reference(codes, scales, layout).reshape(2, 2, -1).transpose(1, 0, 2)
    for rows, halves_of_both in ((slice(0, 8), first), (slice(8, 16), second)):
        stacked = np.concatenate(np.split(codes[rows], 2, axis=1)), np.concatenate(np.split(scales[rows], 2, axis=1))
        expected = to_fragments_reference(*stacked, FragmentLayout(16, 512, chunk=4))
        np.testing.assert_array_equal(halves_of_both.reshape(-1), expected)


def test_halves_are_in_one_order_whatever_the_chunk() -> None:
    """They have no scales that could stand between chunks, and their repack kernel is not told of any."""
    layout = FragmentLayout(37, 576, halves=True)
    values = halves(layout, generator(37))
    words = halves_to_fragments_reference(values, layout)
    for chunk in CHUNKS:
        chunked = replace(layout, chunk=chunk)
        assert chunked.words == layout.words
        np.testing.assert_array_equal(words, halves_to_fragments_reference(values, chunked))
