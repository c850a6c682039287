"""AWQ for FP8: a search for channel scales and group clipping on calibration inputs.

Weights of input channels with large activations are multiplied by s before rounding, and the activations divided by s,
with s = magnitude^alpha for a few alpha. For integers this gives salient weights a finer grid. FP8 is floating-point
and already finer for small weights, so the gain is smaller: docs/quality.md has measurements. alpha = 0 (s = 1) is a
candidate, and so is round-to-nearest.
Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import encode_groups, quantize_groups
from numba_atomflow.ops.scale_search import COARSE_FACTORS, search_scales
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.projection import Quantized, Sharing, evaluate

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MIN_SHARE = np.float32(1e-4)  # of the largest magnitude; lower bound for inactive channels
_MAX_WEIGHT = 65504.0  # the limit of sources, on which kernels rely


def quantize(weights: NDArray[np.float32], inputs: Inputs, sharing: Sharing) -> Quantized:
    """Search channel scales with coarse clipping, then fine clipping for the best channel scales."""
    nearest = evaluate(weights, inputs.gram, *quantize_groups(weights))
    candidates = [channel_scales(inputs.magnitude, alpha, sharing) for alpha in ALPHAS]
    errors = [_search_clipping(weights, inputs, channels, COARSE_FACTORS).error for channels in candidates]
    best = _search_clipping(weights, inputs, candidates[int(np.argmin(errors))])
    return min(nearest, best, key=lambda result: result.error)


def channel_scales(magnitude: NDArray[np.float32], alpha: float, sharing: Sharing) -> NDArray[np.float32] | None:
    """magnitude^alpha [K], normalized so that min * max = 1; None for alpha = 0."""
    shared = sharing.mean(magnitude)
    if alpha == 0 or not shared.any():
        return None
    scales = np.maximum(shared, shared.max() * _MIN_SHARE) ** np.float32(alpha)
    normalized: NDArray[np.float32] = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return normalized


def _search_clipping(
    weights: NDArray[np.float32],
    inputs: Inputs,
    channels: NDArray[np.float32] | None,
    factors: tuple[np.float32, ...] | None = None,
) -> Quantized:
    gram = inputs.gram
    if channels is not None:
        weights = weights * channels
        gram = gram / channels
        gram /= channels[:, None]
        if np.abs(weights).max() > _MAX_WEIGHT:
            return Quantized(np.empty((0, 0), np.uint8), np.empty((0, 0), np.float32), np.inf)
    scales = search_scales(weights, gram) if factors is None else search_scales(weights, gram, factors)
    return evaluate(weights, gram, encode_groups(weights, scales), scales, channels)
