"""FP8 activations: the reference of the kernels against the format's definition, and what the quality script does."""

import fp8_activations as script
import numpy as np

from numba_atomflow.ops.cuda.layout.fp8_activations import SMALLEST, quantize_activations
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups


def test_values_are_off_by_half_a_step_at_most(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((9, 300)) * np.exp2(rng.integers(-20, 20, (9, 1)))).astype(np.float32)
    codes, scales = quantize_activations(x)
    scale = np.repeat(scales, 128, axis=1)[:, :300]
    step = np.maximum(np.abs(x) / 8, scale * 2.0**-9)  # three bits of mantissa; subnormals below 2^-6
    assert (np.abs(dequantize_groups(codes, scales) - x) <= step / 2 * (1 + 1e-6)).all()


def test_it_is_the_scheme_of_the_weights_but_for_ties(rng: np.random.Generator) -> None:
    x = rng.standard_normal((64, 256)).astype(np.float32)
    codes, scales = quantize_activations(x)
    expected_codes, expected_scales = quantize_groups(x)
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
    assert np.mean(codes != expected_codes) < 1e-3
    assert (np.abs(codes.astype(int) - expected_codes) <= 1).all()


def test_zeros_and_the_smallest_numbers_have_finite_scales() -> None:
    x = np.zeros((3, 128), np.float32)
    x[1, 5], x[2, 7] = 1e-44, np.float32(np.finfo(np.float32).max)
    codes, scales = quantize_activations(x)
    assert np.isfinite(scales).all()
    assert (scales[:2] == np.float32(SMALLEST) * np.float32(1 / 448)).all()
    assert not codes[:2].any()
    assert codes[2, 7] == 0x7E


# --- scripts/fp8_activations.py --------------------------------------------------------------------------------------


def test_variants_round_as_they_say(rng: np.random.Generator) -> None:
    x = (rng.standard_normal((5, 300)) * np.exp2(rng.integers(-9, 9, (5, 1)))).astype(np.float32)
    codes, scales = quantize_groups(x)
    np.testing.assert_array_equal(script.round_per_group(x), dequantize_groups(codes, scales))
    for name, coarser in (("power of two", script.round_with_powers_of_two), ("token", script.round_per_token)):
        rounded = coarser(x)
        step = np.maximum(np.abs(x) / 8, 2 * np.abs(x).max(axis=1, keepdims=True) / 448 * 2.0**-9)
        assert (np.abs(rounded - x) <= step / 2 * (1 + 1e-6)).all(), name


def test_sums_of_tensor_cores_are_exact_until_they_need_more_bits_than_there_are(rng: np.random.Generator) -> None:
    few = rng.integers(-3, 4, (2, 8, 256)).astype(np.float64)
    np.testing.assert_array_equal(script.accumulate(few[0], few[1], 128), few[1] @ few[0].T)
    large, small = np.full((1, 64), 16.0), np.full((1, 64), 16.0)
    small[0, 1:] = 2.0**-4  # products of 1 beside one of 256, and then beside their sum
    assert script.accumulate(large, small, 64)[0, 0] == 256 + 63
    small[0, 1:] = 2.0**-12  # products of 2^-8: below 256 * 2^-13
    assert script.accumulate(large, small, 64)[0, 0] == 256
    errors = [record["error"] for record in script.compare_sums(4, 4) if record["in_features"] == 2048]
    assert errors == sorted(errors)
    assert errors[0] < 3e-4
