"""FP8 E4M3 in groups of 128: the weight format of the whole engine.

``value[n, k] = e4m3(code[n, k]) * scale[n, k // 128]``. E4M3 here is OCP's "E4M3FN": sign, 4 exponent bits (bias 7), 3
mantissa bits, largest value 448, no infinities; 0x7f and 0xff are NaN, and the encoder never writes them. Source: OCP
8-bit Floating Point Specification, revision 1.0.

Conversion on the CPU moves the seven magnitude bits to float32's exponent and mantissa. The result is the value times
2^-120 (the exponent biases differ by 127 - 7), subnormals included; the factor is folded into the group scale, so that
a weight costs one shift and one mask. Cost model: 1 byte read per weight, 4 more per 128 for the scale.
"""

import numpy as np
from numba import prange
from numpy.typing import NDArray

from numba_atomflow.ops.formats import FP8_E4M3
from numba_atomflow.ops.jit import cpu_kernel

GROUP = FP8_E4M3.group  # weights along K that share one scale
LARGEST = 448.0  # largest finite E4M3 value

MAGNITUDE_AND_SIGN = 0x87F00000  # bits of a float32 that a shifted code's sign and magnitude occupy
UNBIAS = np.float32(2.0**120)  # a shifted code, read as float32, is the value times 2^-120


# --- reference ---------------------------------------------------------------------------------------------------


def e4m3_table() -> NDArray[np.float32]:
    """All 256 values, straight from the definition of the format."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 0x7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return (sign * values).astype(np.float32)


def e4m3_to_float(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """E4M3 codes of any shape to float32 (exact)."""
    return e4m3_table()[codes]


def encode_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Float32 of any shape to E4M3: round to nearest even, saturate at 448. No NaN."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), LARGEST)
    # Between 2^e and 2^(e+1) representable values are 2^(e-3) apart; below 2^-6 the spacing stays that of 2^-6.
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -6)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int64)  # rint rounds half to even; 0..16
    # `steps` of 8..15 hold the hidden bit; 16 carries into the exponent by the addition.
    codes = np.where(steps == 0, 0, ((exponent + 6) << 3) + steps)
    return (codes | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def quantize_groups_reference(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """What `quantize_groups` computes, in plain NumPy."""
    rows, in_features = weights.shape
    codes = np.empty((rows, in_features), np.uint8)
    scales = np.empty((rows, group_count(in_features)), np.float32)
    for g in range(scales.shape[1]):
        block = weights[:, g * GROUP : (g + 1) * GROUP]
        largest = np.abs(block).max(axis=1)
        scale = largest / np.float32(LARGEST)
        scales[:, g] = np.where(scale > 0, scale, np.float32(1.0))
        codes[:, g * GROUP : (g + 1) * GROUP] = encode_e4m3(block / scales[:, g : g + 1])
    return codes, scales


def dequantize_groups(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Codes [N, K] and scales [N, ceil(K / 128)] to float32 weights [N, K]."""
    in_features = codes.shape[1]
    return e4m3_to_float(codes) * np.repeat(scales, GROUP, axis=1)[:, :in_features]


def group_count(in_features: int) -> int:
    """Groups along K; the last one may be short."""
    return -(-in_features // GROUP)


# --- CPU ---------------------------------------------------------------------------------------------------------


@cpu_kernel(inline=True)
def convert_biased(code):
    """One code, as int8, to its value times 2^-120: a sign-extending load, a shift, a mask."""
    return np.int32((np.int64(code) << 20) & MAGNITUDE_AND_SIGN).view(np.float32)


@cpu_kernel(inline=True, exact=True)
def encode_one(value):
    """One finite float32 to its E4M3 code: rounded to nearest even on the bits, saturated at 448."""
    bits = np.float32(value).view(np.int32)
    sign = (bits >> 24) & 0x80
    magnitude = np.int32(bits & 0x7FFFFFFF)
    exponent = (magnitude >> 23) - 127
    if exponent < -6:  # subnormal in E4M3: a multiple of 2^-9; adding 2^14 leaves that multiple in the low bits
        shifted = np.float32(np.int32(magnitude).view(np.float32) + np.float32(16384.0))
        return np.uint8(sign | (np.int64(np.float32(shifted).view(np.int32)) & 0xF))
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)  # keep 3 of 23 mantissa bits
    code = (rounded >> 20) - (120 << 3)
    return np.uint8(sign | min(np.int64(0x7E), np.int64(code)))


@cpu_kernel(exact=True)
def _quantize(weights, codes, scales):
    rows, in_features = weights.shape
    for n in prange(rows):
        for g in range(scales.shape[1]):
            start, stop = g * GROUP, min(in_features, (g + 1) * GROUP)
            largest = np.float32(0.0)
            for k in range(start, stop):
                largest = max(largest, abs(weights[n, k]))
            scale = largest / np.float32(LARGEST)
            if scale == 0.0:
                scale = np.float32(1.0)
            scales[n, g] = scale
            for k in range(start, stop):
                codes[n, k] = encode_one(weights[n, k] / scale)


@cpu_kernel(exact=True)
def _encode_groups(weights, scales, codes):
    rows, in_features = weights.shape
    for n in prange(rows):
        for k in range(in_features):
            codes[n, k] = encode_one(weights[n, k] / scales[n, k // GROUP])


def encode_groups(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Weights [N, K] to the nearest codes with the group scales [N, ceil(K / 128)]; too large ones saturate."""
    codes = np.empty(weights.shape, np.uint8)
    _encode_groups(np.ascontiguousarray(weights, np.float32), scales, codes)
    return codes


def quantize_groups(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round weights [N, K] to the nearest E4M3 values, with scale = absmax / 448 per row and group of 128 along K.

    Returns codes uint8 [N, K] and scales float32 [N, ceil(K / 128)]; a group of zeros has scale 1. The weights must be
    finite: sources refuse others.
    """
    rows, in_features = weights.shape
    codes = np.empty((rows, in_features), np.uint8)
    scales = np.empty((rows, group_count(in_features)), np.float32)
    _quantize(np.ascontiguousarray(weights, np.float32), codes, scales)
    return codes, scales
