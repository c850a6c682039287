"""Rounding with error feedback (GPTQ): the rounding error of one weight is compensated by the weights after it.

Columns of W (input features) are rounded one after the other. The error of each is spread over the columns not yet
rounded, so that the output on calibration inputs changes least: with G [K, K] the mean of x x^T and U the upper
Cholesky factor of G^-1, a column's error e / U[j, j] is subtracted from column k in proportion to U[j, k]. Columns with
the largest inputs come first (act-order), when most columns are left to compensate for them.

Cost model: K^3 operations for U and N * K^2 / 2 multiply-adds for the feedback. Rows are independent: each thread
rounds all columns of a tile of rows, in blocks of 128 whose weights stay in cache; the update of the columns after a
block is one matrix product. Inside the parallel loop BLAS must be single-threaded: the caller limits it.
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import GROUP, UNBIAS, convert_biased, e4m3_to_float, encode_e4m3, encode_one
from numba_atomflow.ops.jit import cpu_kernel

DAMPING = 0.01  # of G's mean diagonal, added to it: calibration inputs may not span all directions
_BLOCK = 128  # columns rounded before those after them are updated (lazy batch updates)
_TILE = 64  # rows that a thread rounds at a time


# --- reference ---------------------------------------------------------------------------------------------------


def round_with_feedback_reference(
    weights: NDArray[np.float64], scales: NDArray[np.float32], gram: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """What `round_with_feedback` computes, from the definition: after each column the best update of all others."""
    weights, codes = weights.copy(), np.empty(weights.shape, np.uint8)
    remaining = list(np.argsort(-np.diag(gram), kind="stable"))
    damped = gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    while remaining:
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        k = remaining[0]
        scale = scales[:, k // GROUP]
        codes[:, k] = encode_e4m3((weights[:, k] / scale).astype(np.float32))
        error = weights[:, k] - e4m3_to_float(codes[:, k]) * scale
        weights[:, remaining] -= np.outer(error, inverse[0] / inverse[0, 0])
        del remaining[0]
    return codes


# --- CPU ---------------------------------------------------------------------------------------------------------


@cpu_kernel(exact=True)
def _round_rows(weights, scales, group_of, factor, codes):
    """All columns, in order.

    Args:
        weights: float32 [N, K], changed.
        scales: float32 [N, groups]. group_of: int64 [K], each column's group.
        factor: U, float32 [K, K].
        codes: uint8 [N, K], out.
    """
    rows, columns = weights.shape
    for tile in prange((rows + _TILE - 1) // _TILE):
        first = tile * _TILE
        last = min(rows, first + _TILE)
        for start in range(0, columns, _BLOCK):
            stop = min(columns, start + _BLOCK)
            errors = np.empty((last - first, stop - start), np.float32)
            for n in range(first, last):
                for j in range(start, stop):
                    scale = scales[n, group_of[j]]
                    code = encode_one(weights[n, j] / scale)
                    codes[n, j] = code
                    error = (weights[n, j] - convert_biased(np.int8(code)) * UNBIAS * scale) / factor[j, j]
                    errors[n - first, j - start] = error
                    for k in range(j + 1, stop):
                        weights[n, k] -= error * factor[j, k]
            if stop < columns:
                update = np.dot(errors, np.ascontiguousarray(factor[start:stop, stop:]))
                for n in range(first, last):
                    for k in range(stop, columns):
                        weights[n, k] -= update[n - first, k - stop]


def round_with_feedback(
    weights: NDArray[np.float32], scales: NDArray[np.float32], gram: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Codes [N, K] of weights [N, K] with the scales [N, ceil(K / 128)], each rounding error fed to later columns.

    `gram` is the mean of x x^T over calibration inputs, float32 [K, K].
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _feedback_factor(gram, order)
    ordered = np.empty(weights.shape, np.uint8)
    _round_rows(weights.take(order, axis=1), scales, order // GROUP, factor, ordered)
    codes = np.empty_like(ordered)
    codes[:, order] = ordered
    return codes


def _feedback_factor(gram: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.float32]:
    """U of the reordered G with G^-1 = U^T U, upper triangular; the damping grows until G is positive definite."""
    damping = max(DAMPING * float(np.diag(gram).mean()), float(np.finfo(np.float32).tiny))
    while True:
        damped = gram[np.ix_(order, order)]
        damped[np.diag_indices(len(damped))] += np.float32(damping)
        factor = _cholesky_of_inverse(damped)
        if factor is not None:
            return factor
        damping *= 10


def _cholesky_of_inverse(matrix: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Upper Cholesky factor of the inverse, computed in place; None if the matrix is not positive definite.

    LAPACK is column-major: its lower triangle of the transpose is our upper one.
    """
    from scipy.linalg import lapack

    lower, failed = lapack.spotrf(matrix.T, lower=1, overwrite_a=1)
    if not failed:
        lower, failed = lapack.spotri(lower, lower=1, overwrite_c=1)
    if not failed:
        lower, failed = lapack.spotrf(lower, lower=1, overwrite_a=1)
    return None if failed else np.asarray(lower).T
