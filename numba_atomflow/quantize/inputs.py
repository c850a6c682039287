"""Statistics of a projection's inputs, and the output error computed from them.

With G = mean(x x^T), the mean of |E x|^2 over all inputs is trace(E G E^T): the output error of a weight error E needs
only the Gram matrix G, not the inputs.
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import dequantize_groups

_CHUNK_ROWS = 1024


class Inputs:
    """Accumulates statistics of inputs x of width K.

    Attributes:
        gram: mean of x x^T, float32 [K, K]; complete after `finish`.
        magnitude: mean of |x|, float32 [K]; complete after `finish`.
    """

    def __init__(self, width: int) -> None:
        self.gram = np.zeros((width, width), np.float32)
        self.magnitude = np.zeros(width, np.float32)
        self._count = 0

    def add(self, x: NDArray[np.float32]) -> None:
        """Add inputs [T, K], C-contiguous."""
        from scipy.linalg import blas

        # BLAS is column-major: it updates the upper triangle of the transpose, in place.
        blas.ssyrk(1.0, x.T, beta=1.0, c=self.gram.T, overwrite_c=1)
        self.magnitude += np.abs(x).sum(axis=0)
        self._count += len(x)

    def finish(self) -> None:
        """Convert sums to means and fill the other triangle."""
        for start in range(0, len(self.gram), _CHUNK_ROWS):
            stop = min(len(self.gram), start + _CHUNK_ROWS)
            square = self.gram[start:stop, start:stop]
            square[:] = np.tril(square) + np.tril(square, -1).T
            self.gram[:start, start:stop] = self.gram[start:stop, :start].T
        self.gram /= np.float32(self._count)
        self.magnitude /= np.float32(self._count)


def output_energy(weights: NDArray[np.float32], gram: NDArray[np.float32]) -> float:
    """Mean of |W x|^2: weights [N, K] (or their error), gram [K, K]."""
    total = 0.0
    for start in range(0, len(weights), _CHUNK_ROWS):
        rows = weights[start : start + _CHUNK_ROWS]
        total += float(np.einsum("nk,nk->", rows @ gram, rows, dtype=np.float64))
    return total


def output_error(
    weights: NDArray[np.float32], codes: NDArray[np.uint8], scales: NDArray[np.float32], gram: NDArray[np.float32]
) -> float:
    """Mean of |W x - Q x|^2, where Q is dequantized from codes [N, K] and scales [N, groups]; in chunks of rows."""
    total = 0.0
    for start in range(0, len(weights), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        total += output_energy(weights[rows] - dequantize_groups(codes[rows], scales[rows]), gram)
    return total
