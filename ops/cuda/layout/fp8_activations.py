"""FP8 activations: E4M3 codes with one float32 scale for each token and group of 128 along K.

``x[token, k] = e4m3(code[token, k]) * scale[token, k // 128]`` with scale = largest magnitude of the group / 448: the
scheme of the weights (`ops/fp8.py`), computed for each step. Codes are the values times 448 / largest magnitude,
rounded to nearest even and saturated: a multiplication where the weights have a division, so that a code may differ
from theirs by one where a value is in the middle of two. A group of zeros has the scale of `SMALLEST`, which no
product of finite numbers notices; no scale is ever zero or infinite.

Scales are not rounded to powers of two: that doubles the divergence of the next-token distribution (docs/quality.md).
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32
from numba_atomflow.ops.fp8 import GROUP, LARGEST, encode_e4m3, group_count

SMALLEST = 2.0**-100  # largest magnitude that a group's scale is made of, at least
_INVERSE = np.float32(1 / LARGEST)


# --- reference ---------------------------------------------------------------------------------------------------


def quantize_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Finite x [tokens, K] to codes [tokens, K] and scales [tokens, ceil(K / 128)], as the kernels do."""
    tokens, in_features = x.shape
    padded = np.zeros((tokens, group_count(in_features), GROUP), np.float32)
    padded.reshape(tokens, -1)[:, :in_features] = x
    largest = np.maximum(np.abs(padded).max(axis=2), np.float32(SMALLEST))
    codes = encode_e4m3(padded * (np.float32(LARGEST) / largest)[..., None])
    return np.ascontiguousarray(codes.reshape(tokens, -1)[:, :in_features]), largest * _INVERSE


# --- GPU ---------------------------------------------------------------------------------------------------------


@ptx.device_function
def group_scale(largest):
    """A group's scale, and the factor from its values to those of its codes."""
    bounded = ptx.max_f32(largest, f32(SMALLEST))
    return bounded * _INVERSE, f32(LARGEST) / bounded
