"""FP8 activations: the reference of the kernels against the definition of the format."""

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
