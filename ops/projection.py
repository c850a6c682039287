"""Projections: y = x W^T with weights W [N, K], FP8 in groups of 128 along K or float16; float32 everywhere else.

`scales` is None for float16 weights, whose bits come as int16. numba compiles a kernel once for each format, without
the branch for the other.

Two regimes. One token (decode, a GEMV) is bound by reading the weights once: N * K bytes of codes and N * K / 32 of
scales, so each weight is converted in registers just before its multiply-add. Many tokens (a prefill chunk, a GEMM) are
bound by arithmetic: 2 * N * K * T operations; there a tile of weights is dequantized once into a scratch that stays in
L2, and BLAS multiplies it by all tokens. Inside the parallel loop BLAS must be single-threaded: the caller limits it.

Accumulation is float32: within a group of 128, then over groups.
"""

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from numba_atomflow.ops.activation import silu
from numba_atomflow.ops.fp8 import GROUP, UNBIAS, convert_biased, dequantize_groups
from numba_atomflow.ops.jit import cpu_kernel
from numba_atomflow.ops.simd import fp8_row_dot, half_to_float

LARGEST_TILE = 320  # weight rows dequantized at a time; with fewer, BLAS spends its time on packing x again and again

# Codes convert to their values times 2^-120. x is multiplied by 2^64 first, so that products stay far from float32's
# subnormal range, where arithmetic is slow and inexact.
_LIFT = np.float32(2.0**64)
_UNLIFT = np.float32(2.0**56)


def project_reference(
    x: NDArray[np.float64], codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """x [T, K], codes [N, K], scales [N, groups] -> [T, N]."""
    return x @ dequantize_groups(codes, scales).astype(np.float64).T


# --- one token ---------------------------------------------------------------------------------------------------


@cpu_kernel(inline=True)
def _fp16_row_dot(weights, n, x):
    """Row n of float16 weights, int16 [N, K], times x float32 [K]."""
    total = np.float32(0.0)
    for k in range(weights.shape[1]):
        total += half_to_float(weights[n, k]) * x[k]
    return total


@cpu_kernel()
def project_token(codes, scales, x, y, accumulate):
    """y = W x, or y += W x. codes int8 [N, K], scales float32 [N, groups], x float32 [K], y float32 [N].

    For a float16 weight: codes int16 [N, K], scales None.
    """
    lifted = x * _LIFT
    for n in prange(codes.shape[0]):
        if scales is None:
            value = _fp16_row_dot(codes, n, x)
        else:
            value = fp8_row_dot(codes, scales, n, lifted) * _UNLIFT
        if accumulate:
            y[n] += value
        else:
            y[n] = value


@cpu_kernel()
def project_token_swiglu(codes, scales, x, y):
    """y = silu(W_gate x) * (W_up x). codes int8 [2F, K]: F gate rows, then F up rows. y float32 [F]."""
    lifted = x * _LIFT
    rows = y.shape[0]
    for n in prange(rows):
        gate = fp8_row_dot(codes, scales, n, lifted) * _UNLIFT
        up = fp8_row_dot(codes, scales, rows + n, lifted) * _UNLIFT
        y[n] = silu(gate) * up


# --- many tokens -------------------------------------------------------------------------------------------------


@cpu_kernel(inline=True)
def _dequantize_rows(codes, scales, first, rows, tile):
    """Weights of rows first .. first + rows - 1 as float32 into tile [rows, K]."""
    in_features = codes.shape[1]
    for r in range(rows):
        n = first + r
        if scales is None:
            for k in range(in_features):
                tile[r, k] = half_to_float(codes[n, k])
            continue
        for g in range(scales.shape[1]):
            scale = scales[n, g] * UNBIAS
            for k in range(g * GROUP, min(in_features, (g + 1) * GROUP)):
                tile[r, k] = convert_biased(codes[n, k]) * scale


@cpu_kernel()
def project_chunk(codes, scales, x, y, accumulate, scratch):
    """y = x W^T, or y += x W^T, for the tokens of a prefill chunk.

    Args:
        codes: int8 [N, K]. scales: float32 [N, groups]. For a float16 weight: int16 [N, K], and None.
        x: float32 [T, K], contiguous. y: float32 [T, N].
        scratch: float32 [threads, at least LARGEST_TILE * (K + T)].
    """
    rows, in_features = codes.shape
    tokens = x.shape[0]
    threads = scratch.shape[0]
    rounds = (rows + threads * LARGEST_TILE - 1) // (threads * LARGEST_TILE)
    tile_rows = (rows + threads * rounds - 1) // (threads * rounds)  # the same number of tiles for every thread
    for tile_index in prange((rows + tile_rows - 1) // tile_rows):
        first = tile_index * tile_rows
        count = min(tile_rows, rows - first)
        thread_scratch = scratch[get_thread_id()]
        tile = thread_scratch[: count * in_features].reshape((count, in_features))
        _dequantize_rows(codes, scales, first, count, tile)
        product = thread_scratch[count * in_features : count * (in_features + tokens)].reshape((tokens, count))
        np.dot(x, tile.T, product)
        for t in range(tokens):
            if accumulate:
                for r in range(count):
                    y[t, first + r] += product[t, r]
            else:
                for r in range(count):
                    y[t, first + r] = product[t, r]


@cpu_kernel()
def swiglu(gate_up, y):
    """y[t] = silu(gate[t]) * up[t]. gate_up float32 [T, 2F]: gate, then up. y float32 [T, F]."""
    tokens, width = y.shape
    for t in prange(tokens):
        for f in range(width):
            y[t, f] = silu(gate_up[t, f]) * gate_up[t, width + f]
