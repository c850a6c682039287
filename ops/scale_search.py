"""Group scales that minimise the error of a projection's output: the clipping search.

With the scale absmax / 448 no weight saturates, but where the other 127 fall between the values of E4M3 is left to
chance. Per row and group, this search tries other scales, a little smaller (the largest weights are clipped) and up to
twice as large, and keeps the one with the least error of the group's output on calibration inputs, e G e^T: e is the
rounding error of the group's weights, G [128, 128] the mean of x x^T over the inputs x of the group.

Cost model: 128 multiply-adds per weight and candidate, done by BLAS on tiles of rows. Inside the parallel loop BLAS
must be single-threaded: the caller limits it. Clipping judged by the output of a group: Lin et al., "AWQ:
Activation-aware Weight Quantization" (2023).
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import (
    GROUP,
    LARGEST,
    UNBIAS,
    convert_biased,
    e4m3_to_float,
    encode_e4m3,
    encode_one,
    group_count,
)
from numba_atomflow.ops.jit import cpu_kernel

# Relative to absmax / 448. The grid of E4M3 repeats from one power of two to the next: a wider range finds no more.
FACTORS = tuple(np.float32(2.0 ** (step / 16)) for step in range(-2, 16))
COARSE_FACTORS = FACTORS[2::3]
_TILE = 64  # rows whose errors and outputs stay in cache
_LARGEST_SCALE = np.float32(255.0)  # kernels rely on scales below 2^8; absmax / 448 is at most 146


# --- reference ---------------------------------------------------------------------------------------------------


def search_scales_reference(
    weights: NDArray[np.float64], gram: NDArray[np.float64], factors: tuple[np.float32, ...] = FACTORS
) -> NDArray[np.float32]:
    """What `search_scales` computes, one row and group at a time."""
    scales = np.ones((len(weights), group_count(weights.shape[1])), np.float32)
    for n, row in enumerate(weights):
        for g in range(scales.shape[1]):
            group = slice(g * GROUP, (g + 1) * GROUP)
            block, inputs = row[group].astype(np.float32), gram[group, group]
            base = np.abs(block).max() / np.float32(LARGEST)
            if base == 0:
                continue
            candidates = [np.float32(base * factor) for factor in factors]
            errors = [block - e4m3_to_float(encode_e4m3(block / s)).astype(np.float64) * s for s in candidates]
            costs = [float(error @ inputs @ error) for error in errors]
            scales[n, g] = candidates[int(np.argmin(costs))]
    return scales


# --- CPU ---------------------------------------------------------------------------------------------------------


@cpu_kernel(inline=True, exact=True)
def _candidate(group, factor):
    """absmax / 448 of a row's group, times a factor; 1 for zeros."""
    largest = np.float32(0.0)
    for weight in group:
        largest = max(largest, abs(weight))
    if largest == 0.0:
        return np.float32(1.0)
    return min(largest / np.float32(LARGEST) * factor, _LARGEST_SCALE)


@cpu_kernel(exact=True)
def _search_group(weights, gram, factors, scales):
    """One group of 128 weights along K.

    Args:
        weights: float32 [N, up to 128]. gram: float32, the group's part of G. factors: float32 [candidates].
        scales: float32 [N], out.
    """
    rows, in_features = weights.shape
    for tile in prange((rows + _TILE - 1) // _TILE):
        first = tile * _TILE
        count = min(_TILE, rows - first)
        errors = np.empty((count, in_features), np.float32)
        outputs = np.empty((count, in_features), np.float32)
        best = np.full(count, np.float32(np.inf))
        for factor in factors:
            for r in range(count):
                scale = _candidate(weights[first + r], factor)
                for k in range(in_features):
                    code = np.int8(encode_one(weights[first + r, k] / scale))
                    errors[r, k] = weights[first + r, k] - convert_biased(code) * UNBIAS * scale
            np.dot(errors, gram, outputs)
            for r in range(count):
                cost = np.float32(0.0)
                for k in range(in_features):
                    cost += outputs[r, k] * errors[r, k]
                if cost < best[r]:
                    best[r] = cost
                    scales[first + r] = _candidate(weights[first + r], factor)


def search_scales(
    weights: NDArray[np.float32], gram: NDArray[np.float32], factors: tuple[np.float32, ...] = FACTORS
) -> NDArray[np.float32]:
    """The scales [N, ceil(K / 128)] with the least error of the groups' outputs, for weights [N, K].

    Args:
        weights: float32 [N, K].
        gram: mean of x x^T over calibration inputs x, float32 [K, K].
        factors: candidates, relative to absmax / 448; of equally good ones the first is taken.
    """
    rows, in_features = weights.shape
    chosen = np.ones((rows, group_count(in_features)), np.float32)
    for g in range(chosen.shape[1]):
        group = slice(g * GROUP, (g + 1) * GROUP)
        block, inputs = np.ascontiguousarray(weights[:, group]), np.ascontiguousarray(gram[group, group])
        scales = np.empty(rows, np.float32)
        _search_group(block, inputs, np.array(factors), scales)
        chosen[:, g] = scales
    return chosen
