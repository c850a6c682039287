"""Matrices of bytes that repeat a pool: a device makes them of the pool, without their bytes on the host."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RepeatedBytes:
    """A matrix whose element i, row after row, is pool[(start + i) % len(pool)].

    Attributes:
        pool: uint8, 1-dimensional. start: below its length. shape: rows and columns.
    """

    pool: NDArray[np.uint8]
    start: int
    shape: tuple[int, int]

    itemsize = 1

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> "RepeatedBytes":
        """Some adjacent rows."""
        first, last, _ = rows.indices(len(self))
        columns = self.shape[1]
        return RepeatedBytes(self.pool, (self.start + first * columns) % len(self.pool), (last - first, columns))

    def runs(self) -> Iterator[slice]:
        """The parts of the pool that make up the matrix, in order."""
        start, left = self.start, self.nbytes
        while left:
            stop = min(start + left, len(self.pool))
            yield slice(start, stop)
            left -= stop - start
            start = 0

    def array(self) -> NDArray[np.uint8]:
        """The matrix on the host."""
        matrix, done = np.empty(self.nbytes, np.uint8), 0
        for run in self.runs():
            matrix[done : done + run.stop - run.start] = self.pool[run]
            done += run.stop - run.start
        return matrix.reshape(self.shape)
