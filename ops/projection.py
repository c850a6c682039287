"""Projections: y = x W^T with weights W [N, K], FP8 in groups of 128 along K or float16; float32 everywhere else.

`scales` is None for float16 weights, whose bits come as int16. numba compiles a kernel once for each format, without
the branch for the other.

Two regimes. Up to GEMV_TOKENS tokens (a decode step, one that verifies proposed tokens, a short prompt) read the
weights once: N * K bytes of codes and N * K / 32 of scales. Each weight is converted in registers just before its
multiply-adds (ops/simd_columns.py), and a token has the same bits whatever their number. Many tokens (a prefill chunk,
a GEMM) are bound by arithmetic: 2 * N * K * T operations; there panels of weights are dequantized once and multiplied
by all tokens (ops/simd_gemm.py). A token's result has the same bits whatever other tokens are in its chunk, if that has
more than GEMV_TOKENS; in a shorter one it may differ from that in the last bits.

Accumulation is float32: for few tokens within a group of 128, then over groups; for many within _K_AT_ONCE, then over
those.
"""

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from numba_atomflow.ops.activation import silu
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.ops.jit import cpu_kernel
from numba_atomflow.ops.simd_columns import multiply_gate_up, multiply_row
from numba_atomflow.ops.simd_gemm import COLUMNS, LANES, multiply_rows
from numba_atomflow.ops.simd_panel import float16_columns, quantized_columns

GEMV_TOKENS = 8  # up to here, tokens are multiplied as in a decode step, and their results have the bits of one

# A thread multiplies at a time: these tokens, by this part of K, which stays in L2, and one panel after the other.
_TOKENS_AT_ONCE = 516  # a multiple of ROWS
_K_AT_ONCE = 384
_PANELS_AT_ONCE = 8
_PANEL, _PRODUCTS = _K_AT_ONCE * COLUMNS, _TOKENS_AT_ONCE * COLUMNS
_UNITS_PER_THREAD = 4  # panels, at least
_FEWEST_TOKENS = 128  # of a piece; making a panel takes as long as 8 tokens

_LIFT = np.float32(2.0**64)  # of x where weights are FP8 (simd_columns.multiply_row)


def project_reference(
    x: NDArray[np.float64], codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """x [T, K], codes [N, K], scales [N, groups] -> [T, N]."""
    return x @ dequantize_groups(codes, scales).astype(np.float64).T


# --- a few tokens ------------------------------------------------------------------------------------------------


@cpu_kernel(inline=True)
def _columns(x, scales, width):
    """x [T, K] as the columns of simd_columns: `width` rows, those after the last token 0."""
    columns = np.zeros((width, x.shape[1]), np.float32)
    for t in range(x.shape[0]):
        for k in range(x.shape[1]):
            columns[t, k] = x[t, k] if scales is None else x[t, k] * _LIFT
    return columns


@cpu_kernel()
def project_token(codes, scales, x, y, accumulate):
    """y = W x, or y += W x. codes int8 [N, K], scales float32 [N, groups], x float32 [1, K], y float32 [1, N].

    For a float16 weight: codes int16 [N, K], scales None.
    """
    columns = _columns(x, scales, 1)
    for n in prange(codes.shape[0]):
        multiply_row(codes, scales, n, columns, y, 1, accumulate, 1)


@cpu_kernel()
def project_tokens(codes, scales, x, y, accumulate):
    """The same for x [T, K] and y [T, N] of 2 to GEMV_TOKENS tokens, each with the bits of `project_token`."""
    tokens = x.shape[0]
    columns = _columns(x, scales, tokens + tokens % 2)
    for n in prange(codes.shape[0]):
        if tokens <= 2:
            multiply_row(codes, scales, n, columns, y, tokens, accumulate, 2)
        elif tokens <= 4:
            multiply_row(codes, scales, n, columns, y, tokens, accumulate, 4)
        elif tokens <= 6:
            multiply_row(codes, scales, n, columns, y, tokens, accumulate, 6)
        else:
            multiply_row(codes, scales, n, columns, y, tokens, accumulate, 8)


@cpu_kernel()
def project_token_swiglu(codes, scales, x, y):
    """y = silu(W_gate x) * (W_up x). codes int8 [2F, K]: F gate rows, then F up rows. x [1, K], y [1, F], float32."""
    columns = _columns(x, scales, 1)
    for n in prange(y.shape[1]):
        multiply_gate_up(codes, scales, n, columns, y, 1, 1)


@cpu_kernel()
def project_tokens_swiglu(codes, scales, x, y):
    """The same for x [T, K] and y [T, F] of 2 to GEMV_TOKENS tokens, each with the bits of `project_token_swiglu`."""
    tokens = x.shape[0]
    columns = _columns(x, scales, tokens + tokens % 2)
    for n in prange(y.shape[1]):
        if tokens <= 2:
            multiply_gate_up(codes, scales, n, columns, y, tokens, 2)
        elif tokens <= 4:
            multiply_gate_up(codes, scales, n, columns, y, tokens, 4)
        elif tokens <= 6:
            multiply_gate_up(codes, scales, n, columns, y, tokens, 6)
        else:
            multiply_gate_up(codes, scales, n, columns, y, tokens, 8)


# --- many tokens -------------------------------------------------------------------------------------------------


def chunk_scratch() -> int:
    """Floats of scratch per thread that a projection of a chunk needs: part of a panel, and products."""
    return _PANEL + _PANELS_AT_ONCE * _PRODUCTS


@cpu_kernel(inline=True)
def _make_panel(codes, scales, first, second, k, depth, panel):
    """Columns k .. k + depth - 1 of rows first .. and second .. of a weight, LANES each: a panel [depth, COLUMNS]."""
    if scales is None:
        float16_columns(codes, first, k, depth, panel, 0)
        float16_columns(codes, second, k, depth, panel, LANES)
    else:
        quantized_columns(codes, scales, first, k, depth, panel, 0)
        quantized_columns(codes, scales, second, k, depth, panel, LANES)


@cpu_kernel(inline=True)
def _multiply_panels(codes, scales, second, rows, group, first, x, token, count, panel, products):
    """products[p] = x[token : token + count] times panel p of a weight, one part of K after the other.

    Args:
        second: a panel has LANES rows of the weight, and as many from this number of rows behind them.
        rows: from one panel to the next. group: panels. first: row of the first of them.
        panel: float32 [_PANEL], scratch. products: float32 [at least group * _PRODUCTS], rows of COLUMNS.
    """
    in_features = x.shape[1]
    for k in range(0, in_features, _K_AT_ONCE):
        depth = min(_K_AT_ONCE, in_features - k)
        x_part = token * in_features + k
        for p in range(group):
            row, part = first + p * rows, p * _PRODUCTS
            _make_panel(codes, scales, row, row + second, k, depth, panel)
            multiply_rows(x, x_part, in_features, count, panel, 0, COLUMNS, depth, products, part, COLUMNS, k > 0)


@cpu_kernel(inline=True)
def _token_pieces(tokens, panels, threads):
    """Into how many pieces to cut a chunk for the threads' sake, and the tokens of a piece.

    One, unless there are too few panels. Each piece makes the panels anew, so it has tokens enough to be worth it.
    """
    wanted = (_UNITS_PER_THREAD * threads + panels - 1) // panels
    per_piece = min(tokens, max((tokens + wanted - 1) // wanted, _FEWEST_TOKENS))
    return (tokens + per_piece - 1) // per_piece, per_piece


# A thread has a range of units: a panel times a piece of the chunk.


@cpu_kernel()
def project_chunk(codes, scales, x, y, accumulate, scratch):
    """y = x W^T, or y += x W^T, for the tokens of a prefill chunk.

    Args:
        codes: int8 [N, K]. scales: float32 [N, groups]. For a float16 weight: int16 [N, K], and None.
        x: float32 [T, K], contiguous. y: float32 [T, N].
        scratch: float32 [threads, at least chunk_scratch()].
    """
    tokens, rows = y.shape
    panels = (rows + COLUMNS - 1) // COLUMNS
    pieces, per_piece = _token_pieces(tokens, panels, scratch.shape[0])
    workers = min(scratch.shape[0], panels * pieces)
    for worker in prange(workers):
        panel, products = scratch[get_thread_id(), :_PANEL], scratch[get_thread_id(), _PANEL:]
        unit, end = panels * pieces * worker // workers, panels * pieces * (worker + 1) // workers
        while unit < end:
            first, start = unit % panels * COLUMNS, unit // panels * per_piece
            group = min(_PANELS_AT_ONCE, end - unit, panels - unit % panels)
            unit += group
            stop = min(tokens, start + per_piece)
            for token in range(start, stop, _TOKENS_AT_ONCE):
                count = min(_TOKENS_AT_ONCE, stop - token)
                _multiply_panels(codes, scales, LANES, COLUMNS, group, first, x, token, count, panel, products)
                for p in range(group):
                    row = first + p * COLUMNS
                    width = min(COLUMNS, rows - row)
                    for t in range(count):
                        product = products[p * _PRODUCTS + t * COLUMNS :]
                        out = y[token + t, row : row + width]
                        if accumulate:
                            for i in range(width):
                                out[i] += product[i]
                        else:
                            for i in range(width):
                                out[i] = product[i]


@cpu_kernel()
def project_chunk_swiglu(codes, scales, x, y, scratch):
    """y = silu(x W_gate^T) * (x W_up^T) for the tokens of a prefill chunk: a panel has LANES rows of gate and of up.

    Args:
        codes: int8 [2F, K]: F gate rows, then F up rows. scales: float32 [2F, groups].
        x: float32 [T, K], contiguous. y: float32 [T, F].
        scratch: float32 [threads, at least chunk_scratch()].
    """
    tokens, rows = y.shape
    panels = (rows + LANES - 1) // LANES
    pieces, per_piece = _token_pieces(tokens, panels, scratch.shape[0])
    workers = min(scratch.shape[0], panels * pieces)
    for worker in prange(workers):
        panel, products = scratch[get_thread_id(), :_PANEL], scratch[get_thread_id(), _PANEL:]
        unit, end = panels * pieces * worker // workers, panels * pieces * (worker + 1) // workers
        while unit < end:
            first, start = unit % panels * LANES, unit // panels * per_piece
            group = min(_PANELS_AT_ONCE, end - unit, panels - unit % panels)
            unit += group
            stop = min(tokens, start + per_piece)
            for token in range(start, stop, _TOKENS_AT_ONCE):
                count = min(_TOKENS_AT_ONCE, stop - token)
                _multiply_panels(codes, scales, rows, LANES, group, first, x, token, count, panel, products)
                for p in range(group):
                    row = first + p * LANES
                    width = min(LANES, rows - row)
                    for t in range(count):
                        gate = products[p * _PRODUCTS + t * COLUMNS :]
                        out, up = y[token + t, row : row + width], gate[LANES:]
                        for i in range(width):
                            out[i] = silu(gate[i]) * up[i]


@cpu_kernel()
def swiglu(gate_up, y):
    """y[t] = silu(gate[t]) * up[t]. gate_up float32 [T, 2F]: gate, then up. y float32 [T, F]."""
    tokens, width = y.shape
    for t in prange(tokens):
        for f in range(width):
            y[t, f] = silu(gate_up[t, f]) * gate_up[t, width + f]
