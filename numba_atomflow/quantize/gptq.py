"""GPTQ for FP8: the clipping of groups is searched, then each rounding error is made up for by the weights after it."""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.error_feedback import round_with_feedback
from numba_atomflow.ops.fp8 import encode_groups, quantize_groups
from numba_atomflow.ops.scale_search import search_scales
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.projection import Quantised, Sharing, quantised


def quantize(weights: NDArray[np.float32], inputs: Inputs, sharing: Sharing) -> Quantised:
    """The best of three on calibration inputs: with feedback, with searched scales alone, plain rounding."""
    del sharing  # no channel is scaled
    rounded = quantised(weights, inputs.gram, *quantize_groups(weights))
    scales = search_scales(weights, inputs.gram)
    searched = quantised(weights, inputs.gram, encode_groups(weights, scales), scales)
    fed_back = quantised(weights, inputs.gram, round_with_feedback(weights, scales, inputs.gram), scales)
    return min(rounded, searched, fed_back, key=lambda result: result.error)
