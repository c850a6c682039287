"""Prepacked weights: the order in which GEMV kernels read them (Marlin-style, for `mma.m16n8k16`).

The checkpoint stores a projection row-major: codes [out_features, in_features], scales [out_features, groups]. On the
device, rows come in tiles of 16 (M of the `mma`). A tile is one k-tile or several in sequence, and a k-tile is a
contiguous run of 32-bit words:

- codes: for every 64 weights along K, rows 0-7 and then rows 8-15, 32 lanes of 16 bytes each. Lane 4 g + t holds row g
  (or g + 8), K 16 t to 16 t + 15. Every load of a warp is 512 contiguous bytes, and a lane multiplies what it loads:
  the order of K within an `mma` is free, as long as the activations follow the same order.
- scales: for every 128 weights along K, 8 pairs of float32 (rows g and g + 8), after the codes of their own k-tile: a
  warp issues both in the same batch of loads. Float32, because a shorter type would round the checkpoint's scales.
- padding to a multiple of 128 bytes: bulk copies are aligned and no load straddles a cache line (except those of rows
  8-15 in a k-tile whose groups are no multiple of 4).

k-tiles: kernels whose warps load weights themselves take the whole tile as one (k_tile = 0). Kernels with TMA bulk
copies take k-tiles of a few groups with their own scales (k_tile = 4: 8448 bytes). The last k-tile of a tile may have
fewer groups. In such k-tiles rows 0-7 and rows 8-15 are split (`split_rows`), each with first all codes and then all
scales: a CTA that computes an 8-row (M/2) tile copies one of them.

Row order. Plain: tile i holds rows 16 i to 16 i + 15. Paired, with distance `half`: rows i and i + half of a section of
2 * half rows are rows r and r + 8 of a tile, so that both end in the same lane: gate and up of one unit (half =
intermediate size), or the two elements that RoPE rotates together (half = head_dim / 2, one section per head).

Byte order within a word of 4 weights depends on the converter (`layout/converters.py`).

Padded rows and columns are zero codes with scale 0.

Float16 weights have the same order without scales: a group is 64 weights along K, so that it has as many bytes, and
lane 4 g + t holds 8 adjacent weights of 32. Their rows are not split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.converters import CONVERTERS
from numba_atomflow.ops.cuda.scalars import u32
from numba_atomflow.ops.formats import FP8_E4M3, WeightFormat

TILE_ROWS = 16
GROUP_WORDS = 512  # 16 rows of a group: 2 KB in every format
HALF_GROUP_WORDS = (GROUP_WORDS + TILE_ROWS) // 2  # 8 rows of an FP8 group: codes and scales
_K_MULTIPLE = 128  # K is padded to this in every format


@dataclass(frozen=True)
class PrepackedLayout:
    """Where the weights of a projection [out_features, in_features] are in device memory.

    Attributes:
        half: distance of paired rows; 0: plain order.
        format: of the weights; float16 only in plain order.
        k_tile: groups per k-tile; 0: all of them.
    """

    out_features: int
    in_features: int
    half: int = 0
    format: WeightFormat = FP8_E4M3
    k_tile: int = 0

    # --- K ---

    @property
    def group_in_features(self) -> int:
        """K of a group, which a warp loads together: 2 KB of a tile."""
        return GROUP_WORDS * 32 // (TILE_ROWS * self.format.bits)

    @property
    def padded_in_features(self) -> int:
        """K, padded."""
        return -(-self.in_features // _K_MULTIPLE) * _K_MULTIPLE

    @property
    def groups(self) -> int:
        """Groups along K, the padded ones included."""
        return self.padded_in_features // self.group_in_features

    @property
    def k_tile_groups(self) -> int:
        """Groups of every k-tile of a tile but the last."""
        return min(self.k_tile or self.groups, self.groups)

    @property
    def k_tiles(self) -> int:
        """k-tiles of a tile."""
        return -(-self.groups // self.k_tile_groups)

    @property
    def last_k_tile_groups(self) -> int:
        """Groups of a tile's last k-tile: 1 to `k_tile_groups`."""
        return self.groups - (self.k_tiles - 1) * self.k_tile_groups

    # --- rows ---

    @property
    def section_tiles(self) -> int:
        """Tiles per section of 2 * half rows."""
        return -(-self.half // 8)

    @property
    def tiles(self) -> int:
        if self.half:
            return self.out_features // (2 * self.half) * self.section_tiles
        return -(-self.out_features // TILE_ROWS)

    @property
    def split_rows(self) -> bool:
        """Whether rows 0-7 of a k-tile come before its rows 8-15, each with their scales."""
        return bool(self.k_tile) and self.format.scaled

    # --- words ---

    @property
    def k_tile_words(self) -> int:
        """32-bit words from one k-tile of a tile to the next: a multiple of 32."""
        return self._words_of(self.k_tile_groups)

    @property
    def last_k_tile_words(self) -> int:
        """32-bit words of a tile's last k-tile: a multiple of 32, `k_tile_words` at most."""
        return self._words_of(self.last_k_tile_groups)

    @property
    def tile_words(self) -> int:
        """32-bit words from one tile to the next."""
        return (self.k_tiles - 1) * self.k_tile_words + self.last_k_tile_words

    @property
    def words(self) -> int:
        """32-bit words of the whole projection."""
        return self.tiles * self.tile_words

    def _words_of(self, groups: int) -> int:
        """32-bit words of a k-tile of so many groups."""
        return -(-groups * (GROUP_WORDS + (TILE_ROWS if self.format.scaled else 0)) // 32) * 32

    # --- order ---

    @property
    def convert(self) -> Any:
        """Device function that converts a word of weights; None if they are float16."""
        converter = CONVERTERS.get(self.format.converter)
        return converter.convert if converter else None

    def source_rows(self) -> NDArray[np.int64]:
        """Row of the checkpoint per row of the tiles: [tiles, 16]; -1 for padding."""
        tile, row = np.arange(self.tiles)[:, None], np.arange(TILE_ROWS)[None, :]
        if not self.half:
            source = tile * TILE_ROWS + row
            return np.where(source < self.out_features, source, -1)
        section, first = np.divmod(tile, self.section_tiles)
        unit = first * 8 + row % 8
        source = section * 2 * self.half + row // 8 * self.half + unit
        return np.where(unit < self.half, source, -1)

    def regions(self) -> Iterator["Region"]:
        """The regions of a tile in their order: one per k-tile, or two where rows are split."""
        for k_tile in range(self.k_tiles):
            first = k_tile * self.k_tile_groups
            last = min(first + self.k_tile_groups, self.groups)
            start = k_tile * self.k_tile_words
            for row_halves in (slice(0, 1), slice(1, 2)) if self.split_rows else (slice(0, 2),):
                share = row_halves.stop - row_halves.start
                codes_end = start + (last - first) * share * (GROUP_WORDS // 2)
                scales_end = codes_end + ((last - first) * share * (TILE_ROWS // 2) if self.format.scaled else 0)
                yield Region(slice(first, last), row_halves, slice(start, codes_end), slice(codes_end, scales_end))
                start = scales_end


class Region(NamedTuple):
    """A contiguous part of a tile: all codes, then all scales.

    Attributes:
        groups: of the tile that it holds.
        row_halves: 0: rows 0-7, 1: rows 8-15.
        codes, scales: words of the tile that hold them.
    """

    groups: slice
    row_halves: slice
    codes: slice
    scales: slice


# --- reference ---------------------------------------------------------------------------------------------------


def prepack_reference(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], layout: PrepackedLayout
) -> NDArray[np.uint32]:
    """Codes [N, K] and scales [N, groups] to words [layout.words]; the padding at the ends of k-tiles is zero."""
    converter, source = CONVERTERS[layout.format.converter], layout.source_rows()
    padded = np.zeros((layout.tiles, TILE_ROWS, layout.padded_in_features), np.uint8)
    padded[source >= 0, : layout.in_features] = codes[source[source >= 0]]
    # axes: tile, row / 8, g, 64 of K, t, word, byte -> tile, 64 of K, row / 8, g, t, word, byte
    blocks = padded.reshape(layout.tiles, 2, 8, -1, 4, 4, 4)[..., list(converter.byte_order)]
    ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 2, 4, 5, 6)).view(np.uint32)
    ordered = ordered.reshape(layout.tiles, layout.groups, 2, 2, GROUP_WORDS // 4)  # .., 64 of K, row / 8, ..
    factors = np.zeros((layout.tiles, TILE_ROWS, layout.groups), np.float32)
    factors[source >= 0] = scales[source[source >= 0]] * np.float32(converter.scale_factor)
    pairs = np.ascontiguousarray(factors.reshape(layout.tiles, 2, 8, -1).transpose(0, 3, 2, 1)).view(np.uint32)
    words = np.zeros((layout.tiles, layout.tile_words), np.uint32)
    for region in layout.regions():
        words[:, region.codes] = ordered[:, region.groups, :, region.row_halves].reshape(layout.tiles, -1)
        words[:, region.scales] = pairs[:, region.groups, :, region.row_halves].reshape(layout.tiles, -1)
    return words.reshape(-1)


def unpack_reference(
    words: NDArray[np.uint32], layout: PrepackedLayout
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The inverse: codes [N, K] and scales [N, groups]."""
    converter, tiles = CONVERTERS[layout.format.converter], words.reshape(layout.tiles, layout.tile_words)
    ordered = np.empty((layout.tiles, layout.groups, 2, 2, GROUP_WORDS // 4), np.uint32)
    pairs = np.empty((layout.tiles, layout.groups, 8, 2), np.uint32)
    for region in layout.regions():
        codes_part = ordered[:, region.groups, :, region.row_halves]
        scales_part = pairs[:, region.groups, :, region.row_halves]
        codes_part[:] = tiles[:, region.codes].reshape(codes_part.shape)
        scales_part[:] = tiles[:, region.scales].reshape(scales_part.shape)
    blocks = ordered.view(np.uint8).reshape(layout.tiles, -1, 2, 8, 4, 4, 4)
    inverse = np.argsort(converter.byte_order)
    rows = blocks[..., inverse].transpose(0, 2, 3, 1, 4, 5, 6).reshape(layout.tiles, TILE_ROWS, -1)
    by_row = (
        pairs.view(np.float32)
        .reshape(layout.tiles, -1, 8, 2)
        .transpose(0, 3, 2, 1)
        .reshape(layout.tiles, TILE_ROWS, -1)
    )
    source = layout.source_rows()
    codes = np.empty((layout.out_features, layout.in_features), np.uint8)
    scales = np.empty((layout.out_features, layout.groups), np.float32)
    codes[source[source >= 0]] = rows[source >= 0][:, : layout.in_features]
    scales[source[source >= 0]] = by_row[source >= 0] / np.float32(converter.scale_factor)
    return codes, scales


def prepack_fp16_reference(weights: NDArray[np.float16], layout: PrepackedLayout) -> NDArray[np.uint32]:
    """Float16 weights [N, K] to words [layout.words]."""
    padded = np.zeros((layout.tiles * TILE_ROWS, layout.padded_in_features), np.float16)
    padded[: layout.out_features, : layout.in_features] = weights
    # axes: tile, row / 8, g, 32 of K, t, element -> tile, 32 of K, row / 8, g, t, element
    blocks = padded.reshape(layout.tiles, 2, 8, -1, 4, 8).transpose(0, 3, 1, 2, 4, 5)
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint32)


# --- GPU ---------------------------------------------------------------------------------------------------------


def make_offsets(layout: PrepackedLayout) -> tuple[Any, Any]:
    """Device functions that compute where weights are, in words from the start of their tile. No argument is negative.

    `codes_at(group, part, half)`: the 128 words of 64 of K (part 0 or 1 of the group) and 8 rows (half 0: rows 0-7).
    `scale_at(group, row)`: a row's scale.
    """
    groups, k_tile_groups, k_tile_words = layout.groups, layout.k_tile_groups, layout.k_tile_words
    scales_start = groups * GROUP_WORDS
    even = layout.last_k_tile_groups == k_tile_groups

    @ptx.device_function
    def codes_in_tile(group, part, half):
        return group * GROUP_WORDS + part * 256 + half * 128

    @ptx.device_function
    def scale_in_tile(group, row):
        return scales_start + group * TILE_ROWS + row % 8 * 2 + row // 8

    @ptx.device_function
    def locate(group):
        """Start of the group's k-tile; the group's index in it; groups of that k-tile."""
        # Unsigned, so that a power of two is a shift; then int64, because numba makes a float of uint64 + int64.
        k_tile = np.int64(u32(group) // u32(k_tile_groups))
        first = k_tile * k_tile_groups
        return k_tile * k_tile_words, group - first, k_tile_groups if even else min(k_tile_groups, groups - first)

    @ptx.device_function
    def codes_in_k_tile(group, part, half):
        start, number, count = locate(group)
        return start + half * count * HALF_GROUP_WORDS + number * 256 + part * 128

    @ptx.device_function
    def scale_in_k_tile(group, row):
        start, number, count = locate(group)
        return start + row // 8 * count * HALF_GROUP_WORDS + count * 256 + number * 8 + row % 8

    return (codes_in_k_tile, scale_in_k_tile) if layout.split_rows else (codes_in_tile, scale_in_tile)
