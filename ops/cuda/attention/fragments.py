"""How heads of keys, queries and values lie in the registers of a warp: the same for every kernel of attention.

Loads are of 16 bytes where the head allows it. For queries and keys a lane's 8 neighbouring elements stand for 4 pairs
of what is summed over, in any order, as long as both sides have the same; for values they are 8 columns of the result,
and `element` says which.
"""

from dataclasses import dataclass
from typing import Any

from numba_atomflow.ops import ptx


@dataclass(frozen=True)
class HeadFragments:
    """Of one head.

    Attributes:
        wide, narrow: pieces of 32 and of 16 elements that a query or key is loaded in.
        row_registers: words that a lane has of one row of Q or K.
        value_registers: words that a lane has of one row of V.
        load_row: device function (array, start, t, out, at): a lane's part of one row of Q or K, from word `start`.
        load_value: device function (array, start, g, out, at): a lane's part of one row of V.
        element: device function (t, column, j): the element of the head that fragment j of the sums holds in column
            2 t + column.
    """

    wide: int
    narrow: int
    row_registers: int
    value_registers: int
    load_row: Any
    load_value: Any
    element: Any


def _make_load(lanes: int, fours: int, twos: int, ones: int) -> Any:
    """Device function (array, start, lane, out, at): what one of `lanes` has of a row that begins at word `start`. The
    row consists of pieces of which every lane has four words, then of those with two words, then with one.
    """
    twos_start = fours * 4 * lanes
    ones_start = twos_start + twos * 2 * lanes

    @ptx.device_function
    def load(array, start, lane, out, at):
        for c in range(fours):
            a0, a1, a2, a3 = ptx.load_16(array, start + c * 4 * lanes + lane * 4)
            out[at + 4 * c], out[at + 4 * c + 1], out[at + 4 * c + 2], out[at + 4 * c + 3] = a0, a1, a2, a3
        for _ in range(twos):
            a0, a1 = ptx.load_8(array, start + twos_start + lane * 2)
            out[at + 4 * fours], out[at + 4 * fours + 1] = a0, a1
        for _ in range(ones):
            out[at + 4 * fours + 2 * twos] = array[start + ones_start + lane]

    return load


def make_head_fragments(head_dim: int) -> HeadFragments:
    """For heads of 64, 80, 96, 128 ... elements."""
    wide, narrow = head_dim // 32, head_dim % 32 // 16
    blocks_64, block_32, block_16 = head_dim // 64, head_dim % 64 // 32, head_dim % 32 // 16  # pieces of a value

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
    return HeadFragments(wide, narrow, 4 * wide + 2 * narrow, value_registers, load_row, load_value, element)
