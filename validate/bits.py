"""Two runs compared bit by bit: NaN equals NaN, and 0 is not -0."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Difference(NamedTuple):
    """What two runs differ in.

    Attributes:
        elements: that were compared. different: that have other bits.
        row: the first one with such an element, of any part; None if there is none.
        part: the first part that differs there; None likewise.
    """

    elements: int
    different: int
    row: int | None
    part: str | None


def compare_bits(parts: Iterable[tuple[str, NDArray[Any], NDArray[Any]]]) -> Difference:
    """The difference of named arrays [rows, ...], two of the same shape and dtype of each name."""
    elements = different = 0
    first: tuple[int, str] | None = None
    for name, ours, theirs in parts:
        bits = np.dtype(f"u{ours.dtype.itemsize}")
        differs = np.ascontiguousarray(ours).view(bits) != np.ascontiguousarray(theirs).view(bits)
        elements, different = elements + differs.size, different + int(differs.sum())
        if differs.any():
            row = int(differs.any(axis=1).argmax())
            first = (row, name) if first is None or row < first[0] else first
    return Difference(elements, different, *(first or (None, None)))
