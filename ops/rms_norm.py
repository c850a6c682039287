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


@cpu_kernel(inline=True)
def _norm_in_place(head, weight, eps):
    """One vector; head and weight float32 [N]."""
    squares = np.float32(0.0)
    for k in range(head.shape[0]):
        squares += head[k] * head[k]
    factor = np.float32(1.0 / math.sqrt(squares / head.shape[0] + eps))
    for k in range(head.shape[0]):
        head[k] *= factor * weight[k]


@cpu_kernel(parallel=False)
def rms_norm_heads(qkv, q_weight, k_weight, q_dim, kv_dim, eps):
    """Norm every head of q and of k by itself, in place; v is not touched.

    Args:
        qkv: float32 [T, q_dim + 2 * kv_dim]: heads of q, of k, of v.
        q_weight, k_weight: float32 [head_dim]; or [q_dim] and [kv_dim], and all heads are normed as one.
    """
    for t in range(qkv.shape[0]):
        for start in range(0, q_dim, q_weight.shape[0]):
            _norm_in_place(qkv[t, start : start + q_weight.shape[0]], q_weight, eps)
        for start in range(q_dim, q_dim + kv_dim, k_weight.shape[0]):
            _norm_in_place(qkv[t, start : start + k_weight.shape[0]], k_weight, eps)


@cpu_kernel(parallel=False)
def add_rms_norm(x, weight, eps, residual):
    """residual += the norm of x, which is x afterwards. x and residual float32 [T, H], weight float32 [H]."""
    for t in range(x.shape[0]):
        _norm_in_place(x[t], weight, eps)
        for k in range(x.shape[1]):
            residual[t, k] += x[t, k]
