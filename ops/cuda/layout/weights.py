"""Weights in fragment order: what a projection's tensor-core kernel reads, and the kernel that makes it.

The checkpoint stores a projection plain: codes [N, K] and scales [N, groups], row-major. On the device, rows come in
tiles of 16. A tile is one chunk or several, one behind the other, and a chunk is one run of 32-bit words:

- codes: for every 64 columns, rows 0-7 and then rows 8-15, 32 lanes of 16 bytes each. Lane 4 g + t holds row g (or
  g + 8), columns 16 t to 16 t + 15. Every load of a warp is 512 contiguous bytes, and what a lane loads is what it
  multiplies: which columns meet in one `mma` is free, as long as the vector's follow the same order.
- scales: for every 128 columns, 8 pairs of float32 (rows g and g + 8). They stand behind the codes of their own
  chunk: a warp fetches them in the same batch of loads, from addresses known as early. Float32, because anything
  shorter would round the checkpoint's scales, and a projection is to be exact to 1e-5.
- padding to a multiple of 128 bytes, so that every bulk copy is aligned and no load straddles a cache line (but those
  of rows 8-15 in a chunk whose groups are no multiple of 4).

Chunks: a kernel whose warps load weights themselves wants the whole tile as one (chunk = 0). One that copies weights
to shared memory in bulk wants pieces of a few groups with their own scales (chunk = 4: 8448 bytes). The last chunk of
a tile may have fewer groups. In such chunks the halves of the rows stand apart, rows 0-7 before rows 8-15, and of each
half first all codes and then all scales: a piece that can be copied alone, by a block that has half of a tile.

Two orders of rows. Plain: tile i holds rows 16 i to 16 i + 15. Paired, with distance `half`: rows i and i + half of a
section of 2 * half rows are put at r and r + 8 of a tile. Both then end in the same lane: gate and up of one
unit (half = ffn), or the two elements that RoPE rotates together (half = head_dim / 2, one section per head).

Two orders of bytes within a word of 4 columns, after the way of decoding: `decode_fp8_bits` yields bytes (1, 3) and
(0, 2), `decode_fp8_cvt` yields (0, 1) and (2, 3), and both are to yield columns (0, 1) and (2, 3). The former decodes
to the value times 2^-8, so the scale takes 2^8: exact.

Padding rows and columns are zero codes with scale 0. Cost model of the kernel: N * K bytes read and written, once.

Float16 weights (the vocabulary projection may have them) follow the same plan without scales: a group is 64 columns,
so that it has as many bytes, and lane 4 g + t holds 8 neighbouring columns of 32. Nothing stands between their chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER, U8, U16, U32, Planned, kernel_spec
from numba_atomflow.ops.fp8 import GROUP, group_count

TILE_ROWS = 16
GROUP_WORDS = TILE_ROWS * GROUP // 4  # codes of 16 rows and 128 columns
HALF_WORDS = (GROUP_WORDS + TILE_ROWS) // 2  # codes and scales of 8 rows and 128 columns
THREADS = 256


@dataclass(frozen=True)
class FragmentLayout:
    """Where the weights of a projection [rows, columns] are on the device.

    Attributes:
        half: distance of the rows that are paired; 0: plain order.
        hardware_fp8: bytes and scales are ordered for `decode_fp8_cvt` (sm_89 and later), else for `decode_fp8_bits`.
        halves: the weights are float16, without scales; plain order only.
        chunk: groups of columns per chunk of a tile; 0: all of them.
    """

    rows: int
    columns: int
    half: int = 0
    hardware_fp8: bool = False
    halves: bool = False
    chunk: int = 0

    @property
    def group_columns(self) -> int:
        """Columns whose weights a warp loads together: 2 KB of a tile."""
        return GROUP // 2 if self.halves else GROUP

    @property
    def groups(self) -> int:
        """Groups of columns, the last ones padded."""
        return self.padded_columns // self.group_columns

    @property
    def padded_columns(self) -> int:
        return group_count(self.columns) * GROUP

    @property
    def section_tiles(self) -> int:
        """Tiles per section of 2 * half rows."""
        return -(-self.half // 8)

    @property
    def tiles(self) -> int:
        if self.half:
            return self.rows // (2 * self.half) * self.section_tiles
        return -(-self.rows // TILE_ROWS)

    @property
    def chunk_groups(self) -> int:
        """Groups of every chunk of a tile but the last."""
        return min(self.chunk or self.groups, self.groups)

    @property
    def chunk_words(self) -> int:
        """32-bit words from one chunk of a tile to the next: a multiple of 32."""
        return self._words_of(self.chunk_groups)

    @property
    def chunks(self) -> int:
        """Chunks per tile."""
        return -(-self.groups // self.chunk_groups)

    @property
    def last_chunk_groups(self) -> int:
        """Groups of a tile's last chunk: 1 to `chunk_groups`."""
        return self.groups - (self.chunks - 1) * self.chunk_groups

    @property
    def last_chunk_words(self) -> int:
        """32-bit words of a tile's last chunk: a multiple of 32, `chunk_words` at most."""
        return self._words_of(self.last_chunk_groups)

    @property
    def tile_words(self) -> int:
        """32-bit words from one tile to the next."""
        return (self.chunks - 1) * self.chunk_words + self.last_chunk_words

    @property
    def halves_apart(self) -> bool:
        """Whether rows 0-7 of a chunk stand before its rows 8-15, each with their scales."""
        return bool(self.chunk) and not self.halves

    def _words_of(self, groups: int) -> int:
        """32-bit words of a chunk of so many groups."""
        return -(-groups * (GROUP_WORDS + (0 if self.halves else TILE_ROWS)) // 32) * 32

    @property
    def words(self) -> int:
        """32-bit words of the whole projection."""
        return self.tiles * self.tile_words

    @property
    def byte_order(self) -> tuple[int, int, int, int]:
        """Which of a word's 4 columns stands in byte 0, 1, 2, 3."""
        return (0, 1, 2, 3) if self.hardware_fp8 else (2, 0, 3, 1)

    @property
    def decode(self) -> Any:
        """The device function that makes two float16 pairs, columns (0, 1) and (2, 3), of a word of codes."""
        return ptx.convert_fp8_cvt if self.hardware_fp8 else ptx.convert_fp8_bits

    @property
    def scale_factor(self) -> float:
        """What a scale is multiplied with, to undo what `decode` leaves out."""
        return 1.0 if self.hardware_fp8 else 256.0

    def source_rows(self) -> NDArray[np.int64]:
        """Row of the checkpoint per row of the tiles: [tiles, 16]; -1 for padding."""
        tile, row = np.arange(self.tiles)[:, None], np.arange(TILE_ROWS)[None, :]
        if not self.half:
            source = tile * TILE_ROWS + row
            return np.where(source < self.rows, source, -1)
        section, first = np.divmod(tile, self.section_tiles)
        unit = first * 8 + row % 8
        source = section * 2 * self.half + row // 8 * self.half + unit
        return np.where(unit < self.half, source, -1)

    def pieces(self) -> Iterator[tuple[slice, slice, slice, slice]]:
        """What stands together in a tile, in its order: for each chunk, or for each half of one, which groups, which
        halves of the rows (0: rows 0-7, 1: rows 8-15), and which of the tile's words hold their codes and scales.
        """
        for chunk in range(self.chunks):
            first = chunk * self.chunk_groups
            last = min(first + self.chunk_groups, self.groups)
            start = chunk * self.chunk_words
            for half in (slice(0, 1), slice(1, 2)) if self.halves_apart else (slice(0, 2),):
                share = half.stop - half.start
                codes_end = start + (last - first) * share * (GROUP_WORDS // 2)
                scales_end = codes_end + (0 if self.halves else (last - first) * share * (TILE_ROWS // 2))
                yield slice(first, last), half, slice(start, codes_end), slice(codes_end, scales_end)
                start = scales_end


# --- reference ---------------------------------------------------------------------------------------------------


def to_fragments_reference(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], layout: FragmentLayout
) -> NDArray[np.uint32]:
    """Codes [N, K] and scales [N, groups] to words [layout.words]; the padding at the ends of chunks is zero."""
    source = layout.source_rows()
    padded = np.zeros((layout.tiles, TILE_ROWS, layout.padded_columns), np.uint8)
    padded[source >= 0, : layout.columns] = codes[source[source >= 0]]
    # axes: tile, row / 8, g, 64 columns, t, word, byte -> tile, 64 columns, row / 8, g, t, word, byte
    blocks = padded.reshape(layout.tiles, 2, 8, -1, 4, 4, 4)[..., list(layout.byte_order)]
    ordered = np.ascontiguousarray(blocks.transpose(0, 3, 1, 2, 4, 5, 6)).view(np.uint32)
    ordered = ordered.reshape(layout.tiles, layout.groups, 2, 2, GROUP_WORDS // 4)  # .., 64 columns, row / 8, ..
    factors = np.zeros((layout.tiles, TILE_ROWS, layout.groups), np.float32)
    factors[source >= 0] = scales[source[source >= 0]] * np.float32(layout.scale_factor)
    pairs = np.ascontiguousarray(factors.reshape(layout.tiles, 2, 8, -1).transpose(0, 3, 2, 1)).view(np.uint32)
    words = np.zeros((layout.tiles, layout.tile_words), np.uint32)
    for groups, half, codes_at, scales_at in layout.pieces():
        words[:, codes_at] = ordered[:, groups, :, half].reshape(layout.tiles, -1)
        words[:, scales_at] = pairs[:, groups, :, half].reshape(layout.tiles, -1)
    return words.reshape(-1)


def from_fragments_reference(
    words: NDArray[np.uint32], layout: FragmentLayout
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The inverse: codes [N, K] and scales [N, groups]."""
    tiles = words.reshape(layout.tiles, layout.tile_words)
    ordered = np.empty((layout.tiles, layout.groups, 2, 2, GROUP_WORDS // 4), np.uint32)
    pairs = np.empty((layout.tiles, layout.groups, 8, 2), np.uint32)
    for groups, half, codes_at, scales_at in layout.pieces():
        for place, at in ((ordered[:, groups, :, half], codes_at), (pairs[:, groups, :, half], scales_at)):
            place[:] = tiles[:, at].reshape(place.shape)
    blocks = ordered.view(np.uint8).reshape(layout.tiles, -1, 2, 8, 4, 4, 4)
    inverse = np.argsort(layout.byte_order)
    rows = blocks[..., inverse].transpose(0, 2, 3, 1, 4, 5, 6).reshape(layout.tiles, TILE_ROWS, -1)
    by_row = (
        pairs.view(np.float32)
        .reshape(layout.tiles, -1, 8, 2)
        .transpose(0, 3, 2, 1)
        .reshape(layout.tiles, TILE_ROWS, -1)
    )
    source = layout.source_rows()
    codes = np.empty((layout.rows, layout.columns), np.uint8)
    scales = np.empty((layout.rows, layout.groups), np.float32)
    codes[source[source >= 0]] = rows[source >= 0][:, : layout.columns]
    scales[source[source >= 0]] = by_row[source >= 0] / np.float32(layout.scale_factor)
    return codes, scales


def halves_to_fragments_reference(weights: NDArray[np.float16], layout: FragmentLayout) -> NDArray[np.uint32]:
    """Float16 weights [N, K] to words [layout.words]."""
    padded = np.zeros((layout.tiles * TILE_ROWS, layout.padded_columns), np.float16)
    padded[: layout.rows, : layout.columns] = weights
    # axes: tile, row / 8, g, 32 columns, t, element -> tile, 32 columns, row / 8, g, t, element
    blocks = padded.reshape(layout.tiles, 2, 8, -1, 4, 8).transpose(0, 3, 1, 2, 4, 5)
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint32)


# --- GPU ---------------------------------------------------------------------------------------------------------


def make_places(layout: FragmentLayout) -> tuple[Any, Any]:
    """Device functions that tell where weights are, in words from the start of their tile; nothing is negative.

    `codes_at(group, part, half)`: the 128 words of 64 columns (part 0 or 1 of the group) and 8 rows (half 0: rows 0-7).
    `scale_at(group, row)`: a row's scale.
    """
    groups, chunk_groups, chunk_words = layout.groups, layout.chunk_groups, layout.chunk_words
    scales_start = groups * GROUP_WORDS
    even = layout.last_chunk_groups == chunk_groups

    @ptx.device_function
    def codes_in_tile(group, part, half):
        return group * GROUP_WORDS + part * 256 + half * 128

    @ptx.device_function
    def scale_in_tile(group, row):
        return scales_start + group * TILE_ROWS + row % 8 * 2 + row // 8

    @ptx.device_function
    def split(group):
        """Where the group's chunk begins; the group's number in it; groups that it has."""
        # Unsigned, so that a power of two is a shift; then int64, because numba makes a float of uint64 + int64.
        chunk = np.int64(np.uint32(group) // np.uint32(chunk_groups))
        first = chunk * chunk_groups
        return chunk * chunk_words, group - first, chunk_groups if even else min(chunk_groups, groups - first)

    @ptx.device_function
    def codes_in_chunk(group, part, half):
        start, number, count = split(group)
        return start + half * count * HALF_WORDS + number * 256 + part * 128

    @ptx.device_function
    def scale_in_chunk(group, row):
        start, number, count = split(group)
        return start + row // 8 * count * HALF_WORDS + count * 256 + number * 8 + row % 8

    return (codes_in_chunk, scale_in_chunk) if layout.halves_apart else (codes_in_tile, scale_in_tile)


def make_repack(hardware_fp8: bool) -> Any:
    """Kernel (codes uint8 [N * K], scales float32 [N * groups], words uint32 [layout.words], then the numbers of
    `repack_sizes(layout)`): one thread per word. One kernel for all layouts, because it runs once.

    Launch: `repack_blocks(layout)` blocks of `THREADS` threads, no shared memory.
    """
    sample = FragmentLayout(TILE_ROWS, GROUP, hardware_fp8=hardware_fp8)
    order_0, order_1, order_2, order_3 = sample.byte_order
    factor = np.float32(sample.scale_factor)

    @ptx.device_function
    def source_row(tile, row, rows, half, section_tiles):
        if half == 0:
            source = tile * 16 + row
            return source if source < rows else -1
        unit = tile % section_tiles * 8 + row % 8
        source = tile // section_tiles * (2 * half) + row // 8 * half + unit
        return source if unit < half else -1

    @ptx.device_function
    def code(codes, row, column, columns):
        return np.uint32(codes[row * columns + column]) if column < columns else np.uint32(0)

    @ptx.kernel(THREADS, 1)
    def repack(codes, scales, words, rows, columns, half, chunk_groups, together):
        groups = (columns + 127) // 128
        chunk_words = (chunk_groups * 528 + 31) // 32 * 32
        whole_chunks = (groups - 1) // chunk_groups
        tile_words = whole_chunks * chunk_words + ((groups - whole_chunks * chunk_groups) * 528 + 31) // 32 * 32
        section_tiles = max((half + 7) // 8, 1)
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= len(words):
            return
        tile = index // tile_words
        chunk, word = index % tile_words // chunk_words, index % tile_words % chunk_words
        first_group = chunk * chunk_groups
        count = min(chunk_groups, groups - first_group)
        value = np.uint32(0)
        if word < count * 528:  # else padding
            # Blocks of 128 words, and scales, of the halves of the rows that stand together take turns.
            piece, word = word // (count * 264 * together), word % (count * 264 * together)
            codes_end = count * 256 * together
            if word < codes_end:
                block = word // 128
                row = (piece + block % together) * 8 + word % 128 // 16
                row = source_row(tile, row, rows, half, section_tiles)
                column = first_group * 128 + block // together * 64 + word % 16 * 4
                if row >= 0:
                    value = np.uint32(
                        code(codes, row, column + order_0, columns)
                        | code(codes, row, column + order_1, columns) << 8
                        | code(codes, row, column + order_2, columns) << 16
                        | code(codes, row, column + order_3, columns) << 24
                    )
            else:
                entry = word - codes_end
                row = (piece + entry % together) * 8 + entry // together % 8
                row = source_row(tile, row, rows, half, section_tiles)
                group = first_group + entry // (8 * together)
                if row >= 0:
                    value = np.uint32(ptx.f32_bits(scales[row * groups + group] * factor))
        words[index] = value

    return repack


def make_repack_halves() -> Any:
    """Kernel (weights uint16 [N * K], words uint32 [layout.words], then the numbers of `repack_sizes(layout)`): one
    thread per word. Launched as `make_repack`'s.
    """

    @ptx.device_function
    def half(weights, row, column, rows, columns):
        if row < rows and column < columns:
            return np.uint32(weights[row * columns + column])
        return np.uint32(0)

    @ptx.kernel(THREADS, 1)
    def repack_halves(weights, words, rows, columns):
        tile_words = (columns + 127) // 128 * 1024
        index = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if index >= len(words):
            return
        tile, word = index // tile_words, index % tile_words
        row = tile * 16 + word % 256 // 128 * 8 + word % 128 // 16
        column = word // 256 * 32 + word % 16 * 2
        low = half(weights, row, column, rows, columns)
        words[index] = np.uint32(low | half(weights, row, column + 1, rows, columns) << 16)

    return repack_halves


def repack_kernel(hardware_fp8: bool) -> Planned:
    """The kernel of `make_repack`."""
    signature = (U8, F32, U32, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER)
    return Planned(kernel_spec("repack", make_repack, signature, THREADS, hardware_fp8=hardware_fp8), 0)


def repack_halves_kernel() -> Planned:
    """The kernel of `make_repack_halves`."""
    return Planned(kernel_spec("repack_halves", make_repack_halves, (U16, U32, NUMBER, NUMBER), THREADS), 0)


def repack_blocks(layout: FragmentLayout) -> int:
    """Blocks of the repack kernel."""
    return -(-layout.words // THREADS)


def repack_sizes(layout: FragmentLayout) -> tuple[int, ...]:
    """What a repack kernel is told about a layout: rows, columns, and, with scales, `half`, groups per chunk, and how
    many halves of the rows stand together.
    """
    sizes = (layout.rows, layout.columns)
    return sizes if layout.halves else (*sizes, layout.half, layout.chunk_groups, 1 if layout.halves_apart else 2)
