"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, over a token's hidden state or over each head of its q and k.

Cost model: one token's residual stays in L1, so the cost is its 2 * hidden multiply-adds; for a prefill chunk of T
tokens, 12 * T * hidden bytes, one percent of the projections' time. It runs on one core: starting a parallel loop would
take longer than one token's norm. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

import math

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.jit import cpu_kernel


def rms_norm_reference(x: NDArray[np.float64], weight: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    """x [..., H], weight [H] -> [..., H]."""
    normed: NDArray[np.float64] = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


@cpu_kernel(parallel=False)
def rms_norm(x, weight, eps, y):
    """x and y float32 [T, H], weight float32 [H]."""
    tokens, hidden = x.shape
    for t in range(tokens):
        squares = np.float32(0.0)
        for k in range(hidden):
            squares += x[t, k] * x[t, k]
        factor = np.float32(1.0 / math.sqrt(squares / hidden + eps))
        for k in range(hidden):
            y[t, k] = x[t, k] * factor * weight[k]


@cpu_kernel(parallel=False)
def rms_norm_heads(qkv, q_weight, k_weight, q_dim, kv_dim, eps):
    """Norm every head of q and of k by itself, in place; v is not touched.

    Args:
        qkv: float32 [T, q_dim + 2 * kv_dim]: heads of q, of k, of v.
        q_weight, k_weight: float32 [head_dim].
    """
    head_dim = q_weight.shape[0]
    for t in range(qkv.shape[0]):
        for start in range(0, q_dim + kv_dim, head_dim):
            head = qkv[t, start : start + head_dim]
            weight = q_weight if start < q_dim else k_weight
            squares = np.float32(0.0)
            for k in range(head_dim):
                squares += head[k] * head[k]
            factor = np.float32(1.0 / math.sqrt(squares / head_dim + eps))
            for k in range(head_dim):
                head[k] *= factor * weight[k]
