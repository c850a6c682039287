"""What calibration remembers of a projection's inputs, and the error that it weighs with it.

With G the mean of x x^T, the mean of |E x|^2 over all inputs is the trace of E G E^T: the error E of a weight is judged
by what it does to the outputs, without keeping a single input.
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import dequantize_groups

_ROWS_AT_ONCE = 1024


class Inputs:
    """Collects inputs x of width K, and turns them into their means.

    Attributes:
        gram: mean of x x^T, float32 [K, K]; complete after `finish`.
        magnitude: mean of |x|, float32 [K]; complete after `finish`.
    """

    def __init__(self, width: int) -> None:
        self.gram = np.zeros((width, width), np.float32)
        self.magnitude = np.zeros(width, np.float32)
        self._count = 0

    def add(self, x: NDArray[np.float32]) -> None:
        """Take in inputs [T, K], C-contiguous."""
        from scipy.linalg import blas

        # BLAS counts in columns: it fills the upper triangle of the transpose, in the gram's own memory.
        blas.ssyrk(1.0, x.T, beta=1.0, c=self.gram.T, overwrite_c=1)
        self.magnitude += np.abs(x).sum(axis=0)
        self._count += len(x)

    def finish(self) -> None:
        """Sums become means; the other triangle is filled."""
        for start in range(0, len(self.gram), _ROWS_AT_ONCE):
            stop = min(len(self.gram), start + _ROWS_AT_ONCE)
            square = self.gram[start:stop, start:stop]
            square[:] = np.tril(square) + np.tril(square, -1).T
            self.gram[:start, start:stop] = self.gram[start:stop, :start].T
        self.gram /= np.float32(self._count)
        self.magnitude /= np.float32(self._count)


def output_energy(weights: NDArray[np.float32], gram: NDArray[np.float32]) -> float:
    """Mean of |W x|^2: weights [N, K] (or their error), gram [K, K]."""
    total = 0.0
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        rows = weights[start : start + _ROWS_AT_ONCE]
        total += float(np.einsum("nk,nk->", rows @ gram, rows, dtype=np.float64))
    return total


def output_error(
    weights: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.float32], gram: NDArray[np.float32]
) -> float:
    """Mean of |W x - Q x|^2, Q what codes [N, K] and scales [N, groups] stand for; some rows at a time."""
    total = 0.0
    for start in range(0, len(weights), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        total += output_energy(weights[rows] - dequantize_groups(codes[rows], scales[rows]), gram)
    return total
