"""Rounding with error feedback: what one weight loses, the weights after it make up for.

Columns are rounded one after the other. The error of each is spread over the columns that are still to come, so that the
output on calibration inputs changes least: with G [K, K] the mean of x x^T and U the upper Cholesky factor of G^-1, a
column's error e / U[j, j] is subtracted from column k in proportion to U[j, k]. Columns with the largest inputs come
first, while there are most left to make up for them.

Cost model: K^3 operations for U and N * K^2 / 2 multiply-adds for the feedback. Within a block of 128 columns a row's
weights stay in cache; what the block does to the columns behind it is one matrix product.
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import GROUP, UNBIAS, decode_biased, decode_e4m3, encode_e4m3, encode_one
from numba_atomflow.ops.jit import cpu_kernel

DAMPING = 0.01  # of G's mean diagonal, added to it: calibration inputs may not span all directions
_BLOCK = 128  # columns rounded before the others hear of it


# --- reference ---------------------------------------------------------------------------------------------------


def round_with_feedback_reference(
    weights: NDArray[np.float64], scales: NDArray[np.float32], gram: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """What `round_with_feedback` computes, from the definition: after each column the best update of all others."""
    weights, codes = weights.copy(), np.empty(weights.shape, np.uint8)
    left = list(np.argsort(-np.diag(gram), kind="stable"))
    damped = gram + DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        k = left[0]
        scale = scales[:, k // GROUP]
        codes[:, k] = encode_e4m3((weights[:, k] / scale).astype(np.float32))
        error = weights[:, k] - decode_e4m3(codes[:, k]) * scale
        weights[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
        del left[0]
    return codes


# --- CPU ---------------------------------------------------------------------------------------------------------


@cpu_kernel(exact=True)
def _round_block(weights, scales, factor, codes, errors):  # type: ignore[no-untyped-def]
    """Columns of one block, in order.

    Args:
        weights: float32 [N, B], changed. scales: float32 [N, B], one per weight.
        factor: float32 [B, B], the block of U on the diagonal.
        codes: uint8 [N, B], out. errors: float32 [N, B], out: of each column, over U[j, j].
    """
    rows, columns = weights.shape
    for n in prange(rows):
        for j in range(columns):
            code = encode_one(weights[n, j] / scales[n, j])
            codes[n, j] = code
            error = (weights[n, j] - decode_biased(np.int8(code)) * UNBIAS * scales[n, j]) / factor[j, j]
            errors[n, j] = error
            for k in range(j + 1, columns):
                weights[n, k] -= error * factor[j, k]


def round_with_feedback(
    weights: NDArray[np.float32], scales: NDArray[np.float32], gram: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Codes [N, K] of weights [N, K] under given scales [N, ceil(K / 128)], each rounding error fed to later columns.

    `gram` is the mean of x x^T over calibration inputs, float32 [K, K].
    """
    rows, columns = weights.shape
    order = np.argsort(-np.diag(gram), kind="stable")
    factor = _feedback_factor(gram, order)
    moving, ordered = weights[:, order], np.empty((rows, columns), np.uint8)
    for start in range(0, columns, _BLOCK):
        stop = min(columns, start + _BLOCK)
        block = np.ascontiguousarray(moving[:, start:stop])
        codes, errors = np.empty(block.shape, np.uint8), np.empty_like(block)
        own = np.ascontiguousarray(factor[start:stop, start:stop])
        _round_block(block, np.ascontiguousarray(scales[:, order[start:stop] // GROUP]), own, codes, errors)
        ordered[:, start:stop] = codes
        moving[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(ordered)
    result[:, order] = ordered
    return result


def _feedback_factor(gram: NDArray[np.float32], order: NDArray[np.int64]) -> NDArray[np.float32]:
    """U of the reordered G with G^-1 = U^T U, upper triangular; more damping where the first is not enough."""
    damping = max(DAMPING * float(np.diag(gram).mean()), float(np.finfo(np.float32).tiny))
    while True:
        work = gram[np.ix_(order, order)]
        work[np.diag_indices(len(work))] += np.float32(damping)
        factor = _cholesky_of_inverse(work)
        if factor is not None:
            return factor
        damping *= 10


def _cholesky_of_inverse(matrix: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """In the matrix's own memory, which may be large; None if it is not positive definite.

    LAPACK counts in columns: its lower triangle of the transpose is the upper one in ours.
    """
    from scipy.linalg import lapack

    lower, failed = lapack.spotrf(matrix.T, lower=1, overwrite_a=1)
    if not failed:
        lower, failed = lapack.spotri(lower, lower=1, overwrite_c=1)
    if not failed:
        lower, failed = lapack.spotrf(lower, lower=1, overwrite_a=1)
    return None if failed else np.asarray(lower).T
