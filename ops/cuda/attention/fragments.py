"""Operands of `mma.m16n8k16` from rows of Q, K and V, in 16-byte loads where the head dimension allows it.

The 8 neighbouring float16 elements that a lane loads are not the ones that mma's layout assigns to it. Q K^T may sum
over the head dimension in any order, as long as Q and K have the same one: a load is the lane's next 4 pairs along k.
P V may permute its columns: a load of V is 8 columns of the output, `prmt` pairs the elements of neighbouring keys, and
`element` says which element of the head a column is.
"""

from dataclasses import dataclass
from typing import Any

from numba_atomflow.ops import ptx


@dataclass(frozen=True)
class HeadFragments:
    """Fragments of one head. Lane 4 g + t of a warp is in row g of Q, K and the scores, and in column g of V.

    Attributes:
        wide, narrow: pieces of 32 and of 16 elements, of which a row of Q or K consists; a lane loads 16 and 8 bytes of
            them.
        row_registers: 32-bit words of a lane per row of Q or K.
        value_registers: 32-bit words of a lane per row of V.
        load_row: device function (array, start, t, out, index): a lane's words of the row of Q or K that begins at word
            `start`, to out[index ...].
        load_value: device function (array, start, g, out, index): the same of a row of V.
        element: device function (t, column, j): the element of the head in column 2 t + column of output fragment j.
    """

    wide: int
    narrow: int
    row_registers: int
    value_registers: int
    load_row: Any
    load_value: Any
    element: Any


def _make_load(lanes: int, fours: int, twos: int, ones: int) -> Any:
    """Device function (array, start, lane, out, index): loads the words of one of `lanes` lanes, of the row that begins
    at word `start`. The row has `fours` pieces of four words per lane, then `twos` of two words, then `ones` of one.
    """
    twos_start = fours * 4 * lanes
    ones_start = twos_start + twos * 2 * lanes

    @ptx.device_function
    def load(array, start, lane, out, index):
        for c in range(fours):
            a0, a1, a2, a3 = ptx.load_16(array, start + c * 4 * lanes + lane * 4)
            out[index + 4 * c], out[index + 4 * c + 1] = a0, a1
            out[index + 4 * c + 2], out[index + 4 * c + 3] = a2, a3
        for _ in range(twos):
            a0, a1 = ptx.load_8(array, start + twos_start + lane * 2)
            out[index + 4 * fours], out[index + 4 * fours + 1] = a0, a1
        for _ in range(ones):
            out[index + 4 * fours + 2 * twos] = array[start + ones_start + lane]

    return load


def make_head_fragments(head_dim: int) -> HeadFragments:
    """Fragments of a head of `head_dim` elements: 64, 80, 96, 128 ..."""
    wide, narrow = head_dim // 32, head_dim % 32 // 16
    blocks_64, block_32, block_16 = head_dim // 64, head_dim % 64 // 32, head_dim % 32 // 16  # pieces of a row of V

    load_row, load_value = _make_load(4, wide, narrow, 0), _make_load(8, blocks_64, block_32, block_16)

    @ptx.device_function
    def element(t, column, j):
        n = 2 * t + column
        if j < 8 * blocks_64:
            return j // 8 * 64 + n * 8 + j % 8
        if block_32 > 0 and j < 8 * blocks_64 + 4:
            return blocks_64 * 64 + n * 4 + j - 8 * blocks_64
        return blocks_64 * 64 + block_32 * 32 + n * 2 + j - 8 * blocks_64 - 4 * block_32

    value_registers = 4 * blocks_64 + 2 * block_32 + block_16
    return HeadFragments(
        wide=wide,
        narrow=narrow,
        row_registers=4 * wide + 2 * narrow,
        value_registers=value_registers,
        load_row=load_row,
        load_value=load_value,
        element=element,
    )
