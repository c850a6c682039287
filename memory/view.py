"""Views: address, shape and dtype of a tensor in memory that an arena or a mapped file owns."""

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tiling(Protocol):
    """An order of a matrix in memory other than row after row, as 32-bit words (`ops/cuda/layout/activations.py`)."""

    @property
    def words(self) -> int:
        """32-bit words of the whole matrix, padding included."""

    def pack(self, x: NDArray[Any]) -> NDArray[np.uint32]:
        """The words [words] of a matrix; rows and columns that it lacks are zero."""

    def unpack(self, words: NDArray[np.uint32]) -> NDArray[Any]:
        """The inverse: every row, without padding columns."""


@dataclass(frozen=True, slots=True)
class View:
    """A non-owning view of a tensor in C order, with an optional row pitch; or of the first rows of a tiled matrix.

    Attributes:
        name: for messages, probes and plans.
        address: of the first byte, in the address space of its backend.
        shape: elements per axis.
        dtype: NumPy's name of the element type; FP8 codes are "int8", which decodes by sign extension.
        readonly: the memory must not be written (mapped weights).
        pitch: elements from one row (of the last axis) to the next; 0: rows are contiguous.
        tiling: the order of elements; None: C order. A tiled view has the address and the extent of the whole matrix,
            whatever rows and columns it has, all from 0 on.
    """

    name: str
    address: int
    shape: tuple[int, ...]
    dtype: str
    readonly: bool = False
    pitch: int = 0
    tiling: Tiling | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, without gaps between rows."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one element to the next, per axis.

        Raises:
            ValueError: the view is tiled.
        """
        if self.tiling is not None:
            raise ValueError(f"view {self.name} is tiled: its elements are not at constant distances")
        strides, step = [], np.dtype(self.dtype).itemsize
        for axis in reversed(range(len(self.shape))):
            strides.append(step)
            last = axis == len(self.shape) - 1
            step *= self.pitch if last and self.pitch else self.shape[axis]
        return tuple(reversed(strides))

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.tiling is not None:
            return self.tiling.words * 4
        if not self.pitch or not self.nbytes:
            return self.nbytes
        spans = (stride * (n - 1) for stride, n in zip(self.strides, self.shape, strict=True))
        return sum(spans) + np.dtype(self.dtype).itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA array interface, version 3, for numba, CuPy and PyTorch; only for views of device memory."""
        return {
            "shape": self.shape,
            "typestr": np.dtype(self.dtype).str,
            "data": (self.address, self.readonly),
            "strides": self.strides if self.pitch else None,
            "version": 3,
        }

    def rows(self, start: int, stop: int) -> "View":
        """Rows start .. stop - 1 of the first axis."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of view {self.name}, which has {self.shape[0]}")
        if self.tiling is not None:
            return self._first(start, (stop, *self.shape[1:]))
        return replace(self, address=self.address + start * self.strides[0], shape=(stop - start, *self.shape[1:]))

    def columns(self, start: int, stop: int) -> "View":
        """Elements start .. stop - 1 of every row (of the last axis)."""
        width = self.shape[-1]
        if not 0 <= start <= stop <= width:
            raise IndexError(f"columns {start}:{stop} of view {self.name}, which has {width}")
        if stop - start == width:
            return self
        if self.tiling is not None:
            return self._first(start, (*self.shape[:-1], stop))
        address = self.address + start * self.strides[-1]
        return replace(self, address=address, shape=(*self.shape[:-1], stop - start), pitch=self.pitch or width)

    def _first(self, start: int, shape: tuple[int, ...]) -> "View":
        """A part of a tiled matrix that begins where the matrix does."""
        if start:
            raise IndexError(f"view {self.name} is tiled: a part of it begins at 0, not at {start}")
        return replace(self, shape=shape)

    def index(self, *indices: int) -> "View":
        """The sub-tensor at fixed leading indices: ``cache.index(layer, 0)`` drops the first two axes."""
        view = self
        for i in indices:
            row = view.rows(i, i + 1)
            view = replace(row, shape=row.shape[1:])
        return view

    def host_array(self) -> NDArray[Any]:
        """A NumPy array over the same memory; only for host memory, and only while its owner exists."""
        buffer = (ctypes.c_byte * self.extent).from_address(self.address)
        array: NDArray[Any] = np.ndarray(self.shape, self.dtype, memoryview(buffer), strides=self.strides)
        array.flags.writeable = not self.readonly
        return array


def view_of(name: str, array: NDArray[Any]) -> View:
    """A view of a C-contiguous host array, which must outlive the view."""
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous")
    return View(name, array.ctypes.data, array.shape, array.dtype.name, readonly=not array.flags.writeable)
