"""A view: where a tensor lies, and what it looks like. It owns nothing; the arena or the mapped file does."""

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class View:
    """A contiguous (C-order) tensor in memory that somebody else owns.

    Attributes:
        name: what it holds, for messages, probes and plans.
        address: first byte, in the address space of the backend that made it.
        shape: elements per axis.
        dtype: NumPy's name of the element type; FP8 codes are "int8", which decodes by sign extension.
        readonly: the memory must not be written (mapped weights).
    """

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str
    readonly: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, stop: int) -> "View":
        """Rows start .. stop - 1 of the first axis."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of view {self.name}, which has {self.shape[0]}")
        row_bytes = self.nbytes // self.shape[0]
        return replace(self, address=self.address + start * row_bytes, shape=(stop - start, *self.shape[1:]))

    def index(self, *indices: int) -> "View":
        """The sub-tensor at fixed leading indices: ``cache.index(layer, 0)`` drops the first two axes."""
        view = self
        for i in indices:
            row = view.rows(i, i + 1)
            view = replace(row, shape=row.shape[1:])
        return view

    def host_array(self) -> NDArray[Any]:
        """The tensor as a NumPy array over the same memory; only for views in host memory, while their owner lives."""
        buffer = (ctypes.c_byte * self.nbytes).from_address(self.address)
        array: NDArray[Any] = np.ndarray(self.shape, self.dtype, memoryview(buffer))
        array.flags.writeable = not self.readonly
        return array


def view_of(name: str, array: NDArray[Any]) -> View:
    """A view over an existing C-contiguous host array, which must outlive it."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
    return View(name, array.ctypes.data, array.shape, array.dtype.name, readonly=not array.flags.writeable)
