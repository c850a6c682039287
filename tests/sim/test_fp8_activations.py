"""Kernels that make FP8 activations, in numba's CUDA simulator (checks: tests/support/fp8_activation_cases.py)."""

import numpy as np
import pytest
from fp8_activation_cases import NORMED, QUANTIZED, check_quantize_tiles, check_rms_norm_fp8

from numba_atomflow.ops import ptx
from numba_atomflow.ops.fp8 import e4m3_table


@pytest.mark.parametrize(("in_features", "capacity", "tokens"), QUANTIZED)
def test_quantize_tiles(in_features: int, capacity: int, tokens: int) -> None:
    check_quantize_tiles(in_features, capacity, tokens)


@pytest.mark.parametrize(("in_features", "capacity", "tokens"), NORMED)
def test_rms_norm_fp8(in_features: int, capacity: int, tokens: int) -> None:
    check_rms_norm_fp8(in_features, capacity, tokens)


def test_codes_are_packed_from_the_lowest_byte_rounded_and_saturated() -> None:
    word = ptx.pack_e4m3x4(np.float32(1.0625), np.float32(-3.3), np.float32(1000), np.float32("nan"))
    values = e4m3_table()[np.array([word], np.uint32).view(np.uint8)]
    np.testing.assert_array_equal(values, [1.0, -3.25, 448, np.nan])
