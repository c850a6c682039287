"""AWQ for FP8: scales per input channel, and the clipping of groups, both searched on calibration inputs.

Input channels that carry large activations get their weights multiplied before rounding, and the activations divided by
the same: s = magnitude^alpha, for a few alpha. With integers that gives important weights a finer grid. FP8 is a
floating-point format, its grid is finer for small weights anyway, so less is to be gained; docs/quality.md has the
measurement. alpha = 0 (all s are 1) is among the candidates, and plain rounding is what remains if nothing is better.
Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import encode_groups, quantize_groups
from numba_atomflow.ops.scale_search import COARSE_FACTORS, search_scales
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.projection import Quantised, Sharing, quantised

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALLEST_SHARE = np.float32(1e-4)  # of the largest magnitude: what a silent channel counts as
_LARGEST_WEIGHT = 65504.0  # what sources let through, and kernels count on


def quantize(weights: NDArray[np.float32], inputs: Inputs, sharing: Sharing) -> Quantised:
    """Search channel scales with a coarse search of clipping, then clipping finely under the best ones."""
    rounded = quantised(weights, inputs.gram, *quantize_groups(weights))
    candidates = [channel_scales(inputs.magnitude, alpha, sharing) for alpha in ALPHAS]
    errors = [_searched(weights, inputs, channels, COARSE_FACTORS).error for channels in candidates]
    best = _searched(weights, inputs, candidates[int(np.argmin(errors))])
    return min(rounded, best, key=lambda result: result.error)


def channel_scales(magnitude: NDArray[np.float32], alpha: float, sharing: Sharing) -> NDArray[np.float32] | None:
    """magnitude^alpha [K], its smallest and largest value as far from 1 as each other; None for alpha = 0."""
    shared = sharing.mean(magnitude)
    if alpha == 0 or not shared.any():
        return None
    scales = np.maximum(shared, shared.max() * _SMALLEST_SHARE) ** np.float32(alpha)
    centred: NDArray[np.float32] = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return centred


def _searched(
    weights: NDArray[np.float32],
    inputs: Inputs,
    channels: NDArray[np.float32] | None,
    factors: tuple[np.float32, ...] | None = None,
) -> Quantised:
    gram = inputs.gram
    if channels is not None:
        weights = weights * channels
        gram = gram / channels
        gram /= channels[:, None]
        if np.abs(weights).max() > _LARGEST_WEIGHT:
            return Quantised(np.empty((0, 0), np.uint8), np.empty((0, 0), np.float32), np.inf)
    scales = search_scales(weights, gram) if factors is None else search_scales(weights, gram, factors)
    return quantised(weights, gram, encode_groups(weights, scales), scales, channels)
