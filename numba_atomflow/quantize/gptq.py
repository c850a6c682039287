"""GPTQ for FP8: group clipping is searched, then rounding errors are compensated by later weights (error feedback)."""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.error_feedback import round_with_feedback
from numba_atomflow.ops.fp8 import encode_groups, quantize_groups
from numba_atomflow.ops.scale_search import search_scales
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.projection import Quantized, Sharing, evaluate


def quantize(weights: NDArray[np.float32], inputs: Inputs, sharing: Sharing) -> Quantized:
    """The best of three on calibration inputs: error feedback, clipping only, round-to-nearest."""
    del sharing  # GPTQ uses no channel scales
    nearest = evaluate(weights, inputs.gram, *quantize_groups(weights))
    scales = search_scales(weights, inputs.gram)
    clipped = evaluate(weights, inputs.gram, encode_groups(weights, scales), scales)
    feedback = evaluate(weights, inputs.gram, round_with_feedback(weights, scales, inputs.gram), scales)
    return min(nearest, clipped, feedback, key=lambda result: result.error)
