"""Embedding lookup: one row of the embedding per token, FP8 in groups or float16.

Cost model: hidden bytes and hidden / 32 bytes of scales (2 * hidden bytes of float16) read per token, 4 * hidden
written: negligible beside a projection.
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import GROUP, UNBIAS, convert_biased, dequantize_groups
from numba_atomflow.ops.jit import cpu_kernel
from numba_atomflow.ops.simd import half_to_float


def embed_reference(
    tokens: NDArray[np.int32], codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Rows ``tokens`` [T] of the embedding (codes [V, H], scales [V, groups]): [T, H]."""
    return dequantize_groups(codes[tokens], scales[tokens]).astype(np.float64)


@cpu_kernel(parallel=False)
def embed(tokens, codes, scales, residual):
    """residual[t] = embedding[tokens[t]].

    Args:
        tokens: int32 [T]. residual: float32 [T, H].
        codes: int8 [V, H]; or int16, the bits of float16. scales: float32 [V, groups]; or None for float16.
    """
    for t in range(tokens.shape[0]):
        row = tokens[t]
        for k in range(codes.shape[1]):
            if scales is None:
                residual[t, k] = half_to_float(codes[row, k])
            else:
                residual[t, k] = convert_biased(codes[row, k]) * (scales[row, k // GROUP] * UNBIAS)
