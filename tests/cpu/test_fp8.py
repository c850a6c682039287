"""FP8 E4M3: every code and every midpoint against ml_dtypes, groups bit for bit against their reference."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import (
    GROUP,
    LARGEST,
    dequantize_groups,
    e4m3_to_float,
    encode_e4m3,
    quantize_groups,
    quantize_groups_reference,
)

CODES = np.arange(256, dtype=np.uint8)
FINITE = CODES[(CODES & 0x7F) != 0x7F]
POSITIVE = np.arange(0x7F, dtype=np.uint8)  # 0 to 448, ascending


def convert_independently(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def encode_independently(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """ml_dtypes rounds to nearest even and turns what is too large into NaN, so saturate before."""
    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def encode_by_kernel(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values of at most 448 through the compiled encoder: a 448 before every 127 values makes all scales 1."""
    padded = np.zeros((-(-values.size // (GROUP - 1)), GROUP), np.float32)
    padded[:, 0] = LARGEST
    padded[:, 1:].flat[: values.size] = values
    codes, scales = quantize_groups(padded)
    assert np.all(scales == 1.0)
    return codes[:, 1:].flatten()[: values.size]


ENCODERS = pytest.mark.parametrize("encode", [encode_e4m3, encode_by_kernel])


def test_all_codes_convert_as_in_ml_dtypes() -> None:
    ours, theirs = e4m3_to_float(CODES), convert_independently(CODES)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(np.signbit(ours[FINITE]), np.signbit(theirs[FINITE]))  # -0.0 is 0x80
    assert np.flatnonzero(np.isnan(ours)).tolist() == [0x7F, 0xFF]


@ENCODERS
def test_every_finite_code_survives_conversion_and_encoding(encode) -> None:
    np.testing.assert_array_equal(encode(e4m3_to_float(FINITE)), FINITE)


@ENCODERS
@pytest.mark.parametrize("sign", [1, -1])
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer_one(encode, sign: int) -> None:
    values = e4m3_to_float(POSITIVE).astype(np.float64)
    midpoints = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    lower, flag = POSITIVE[:-1], np.uint8(0x80 if sign < 0 else 0)
    even = np.where(lower % 2 == 0, lower, lower + 1).astype(np.uint8)
    np.testing.assert_array_equal(encode(sign * midpoints), even | flag)
    np.testing.assert_array_equal(encode(sign * np.nextafter(midpoints, np.float32(0))), lower | flag)
    above = np.nextafter(midpoints, np.float32(np.inf))
    np.testing.assert_array_equal(encode(sign * above), (lower + 1).astype(np.uint8) | flag)
    np.testing.assert_array_equal(encode_independently(sign * midpoints), even | flag)


@ENCODERS
def test_small_numbers_keep_their_sign_and_become_subnormal_codes_or_zero(encode) -> None:
    step = np.float32(2.0**-9)
    values = np.array([0.0, 1e-45, step / 2, np.nextafter(step / 2, np.float32(1)), step, 7.5 * step], np.float32)
    np.testing.assert_array_equal(encode(values), [0, 0, 0, 1, 1, 8])
    np.testing.assert_array_equal(encode(-values), [0x80, 0x80, 0x80, 0x81, 0x81, 0x88])


def test_large_numbers_saturate() -> None:
    values = np.array([448, 449, 464, 480, 1e30, np.inf], np.float32)
    np.testing.assert_array_equal(encode_e4m3(values), np.full(6, 0x7E))
    np.testing.assert_array_equal(encode_e4m3(-values), np.full(6, 0xFE))


@ENCODERS
def test_all_bfloat16_values_encode_as_in_ml_dtypes(encode) -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) <= LARGEST)]
    np.testing.assert_array_equal(encode(values), encode_independently(values))


@ENCODERS
@given(values=arrays.arrays(np.float32, st.integers(1, 300), elements=st.floats(-LARGEST, LARGEST, width=32)))
@settings(deadline=None)  # the first example compiles
def test_any_values_encode_as_in_ml_dtypes(encode, values: NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(encode(values), encode_independently(values))


def same_as_reference(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    codes, scales = quantize_groups(weights)
    expected_codes, expected_scales = quantize_groups_reference(weights)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales.view(np.uint32), expected_scales.view(np.uint32))
    return codes, scales


@pytest.mark.parametrize(
    ("rows", "in_features"), [(1, 1), (3, 127), (5, 128), (7, 129), (33, 200), (64, 576), (2, 1536)]
)
def test_groups_equal_their_reference_bit_for_bit(rng: np.random.Generator, rows: int, in_features: int) -> None:
    weights = (rng.standard_normal((rows, in_features)) * np.exp(rng.uniform(-20, 5, (rows, 1)))).astype(np.float32)
    codes, scales = same_as_reference(weights)
    assert codes.shape == (rows, in_features)
    assert scales.shape == (rows, -(-in_features // 128))


@given(
    weights=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 300)),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    )
)
@settings(deadline=None)
def test_any_finite_weights_equal_their_reference_and_never_become_nan(weights: NDArray[np.float32]) -> None:
    codes, scales = same_as_reference(weights)
    assert not np.any((codes & 0x7F) == 0x7F)
    assert np.all(np.isfinite(scales))
    assert np.all(scales > 0)


@given(
    weights=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 300)),
        elements=st.one_of(st.just(0.0), st.floats(2.0**-60, 2.0**60, width=32), st.floats(-1, -(2.0**-9), width=32)),
    )
)
@settings(deadline=None)
def test_every_weight_is_within_half_a_step_of_its_group(weights: NDArray[np.float32]) -> None:
    codes, scales = quantize_groups(weights)
    rebuilt = dequantize_groups(codes, scales).astype(np.float64)
    scale = np.repeat(scales, GROUP, axis=1)[:, : weights.shape[1]].astype(np.float64)
    # Half a step is 1/16 of a normal value, and half of 2^-9 below; 1 + 2^-20 covers the division in float32.
    step = np.maximum(np.abs(weights) / 16, scale * 2.0**-10)
    assert np.all(np.abs(rebuilt - weights) <= step * (1 + 2.0**-20))
    np.testing.assert_array_equal(np.sign(rebuilt) * np.sign(weights) < 0, False)


def test_the_largest_of_a_group_is_kept_and_a_group_of_zeros_has_scale_one(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((6, 300)).astype(np.float32)
    weights[2, 128:256] = 0
    codes, scales = quantize_groups(weights)
    rebuilt = dequantize_groups(codes, scales)
    for start in (0, 128, 256):
        block, same = weights[:, start : start + 128], rebuilt[:, start : start + 128]
        largest = np.argmax(np.abs(block), axis=1)[:, None]
        np.testing.assert_allclose(
            np.take_along_axis(same, largest, 1), np.take_along_axis(block, largest, 1), rtol=2.0**-22
        )
    assert scales[2, 1] == 1.0
    assert not codes[2, 128:256].any()


def test_dequantizing_matches_an_independent_formula(rng: np.random.Generator) -> None:
    codes = rng.choice(FINITE, (9, 201))
    scales = rng.uniform(0.001, 2, (9, 2)).astype(np.float32)
    expected = np.concatenate(
        [convert_independently(codes[:, :128]) * scales[:, :1], convert_independently(codes[:, 128:]) * scales[:, 1:]],
        1,
    )
    np.testing.assert_array_equal(dequantize_groups(codes, scales), expected)


def test_the_comparison_sees_scales_of_the_wrong_group(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((4, 256)).astype(np.float32) * np.repeat([1.0, 3.0], 128).astype(np.float32)
    codes, scales = quantize_groups(weights)
    right, wrong = (np.linalg.norm(dequantize_groups(codes, s) - weights) for s in (scales, scales[:, ::-1]))
    assert wrong > 10 * right


@pytest.mark.parametrize("layout", ["transposed", "float64"])
def test_other_layouts_and_dtypes_are_brought_into_form(rng: np.random.Generator, layout: str) -> None:
    weights = rng.standard_normal((5, 140)).astype(np.float32)
    given_weights = np.asfortranarray(weights) if layout == "transposed" else weights.astype(np.float64)
    for ours, expected in zip(quantize_groups(given_weights), quantize_groups_reference(weights), strict=True):
        np.testing.assert_array_equal(ours, expected)
