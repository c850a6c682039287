"""Projections against float64: one token and prefill chunks, any K, nothing read or written beside the arrays."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest
from closeness import check_close, poisoned, relative_l2, tolerance
from numpy.typing import NDArray

from numba_atomflow.ops import projection
from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.fp8 import quantize_groups

IN_FEATURES = [1, 7, 8, 9, 127, 128, 129, 136, 200, 576]
TOKENS = [1, 2, 4, 5, 7, 65, 200, 513]
FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
SUBNORMAL = np.array([code for code in range(256) if 0 < code & 0x7F < 8], np.uint8)


@dataclass
class Weight:
    """Random codes and scales, and the dequantized weights in float64."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    values: NDArray[np.float64]

    def unsigned(self) -> NDArray[np.uint8]:
        return self.codes.view(np.uint8)


def random_weight(rng: np.random.Generator, rows: int, in_features: int, codes: NDArray[np.uint8] = FINITE) -> Weight:
    chosen = rng.choice(codes, (rows, in_features))
    scales = np.exp(rng.uniform(-9, -3, (rows, -(-in_features // 128)))).astype(np.float32)
    converted = chosen.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    group_of = np.arange(in_features) // 128
    return Weight(chosen.view(np.int8), scales, converted * scales[:, group_of].astype(np.float64))


def random_fp16(rng: np.random.Generator, rows: int, in_features: int) -> Weight:
    """Float16 weights as kernels take them: bits as int16, and no scales. Subnormals are among them."""
    values = (rng.standard_normal((rows, in_features)) * np.exp(rng.uniform(-12, 2, (rows, in_features)))).astype(
        np.float16
    )
    return Weight(values.view(np.int16), np.empty((0, 0), np.float32), values.astype(np.float64))


def random_x(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Normal values in C-contiguous rows; NaN follows the last."""
    memory = poisoned(int(np.prod(shape)) + 64)
    x = memory[:-64].reshape(shape)
    x[:] = rng.standard_normal(shape)
    return x


def magnitude(x: NDArray[np.float32], weight: Weight) -> NDArray[np.float64]:
    """Size of each sum as if its terms had random signs: one that cancels out is not held to its own size."""
    return np.sqrt((x.astype(np.float64) ** 2) @ (weight.values**2).T)


def roundings(in_features: int) -> float:
    """A product, its sum and its scale each round: at most three operations per element of K."""
    return 3.0 * in_features


def scratch() -> NDArray[np.float32]:
    return poisoned(numba.config.NUMBA_NUM_THREADS, projection.chunk_scratch())


def test_the_reference_is_a_plain_matrix_product(rng: np.random.Generator) -> None:
    weight, x = random_weight(rng, 5, 200), rng.standard_normal((3, 200))
    expected = np.array([[sum(a * b for a, b in zip(row, w, strict=True)) for w in weight.values] for row in x])
    got = projection.project_reference(x, weight.unsigned(), weight.scales)
    # The reference multiplies code and scale in float32.
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=2.0**-23 * float(np.abs(x).max() * np.abs(weight.values).sum())
    )


# --- one token ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 67])
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_one_token(rng: np.random.Generator, in_features: int, rows: int, accumulate: bool) -> None:
    weight, x = random_weight(rng, rows, in_features), random_x(rng, in_features)
    y = rng.standard_normal(rows).astype(np.float32) if accumulate else poisoned(rows)
    expected = weight.values @ x.astype(np.float64) + (y if accumulate else 0)
    size = magnitude(x, weight) + (np.abs(y) if accumulate else 0)
    projection.project_token(weight.codes, weight.scales, x[None], y[None], accumulate)
    check_close(y, expected, tolerance(roundings(in_features)), size)


@pytest.mark.parametrize("in_features", [9, 136, 576])
def test_one_token_with_subnormal_codes(rng: np.random.Generator, in_features: int) -> None:
    weight, x, y = random_weight(rng, 33, in_features, SUBNORMAL), random_x(rng, in_features), poisoned(33)
    projection.project_token(weight.codes, weight.scales, x[None], y[None], False)
    check_close(y, weight.values @ x.astype(np.float64), tolerance(roundings(in_features)), magnitude(x, weight))


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e6])
def test_one_token_of_any_size(rng: np.random.Generator, size: float) -> None:
    weight, x, y = random_weight(rng, 33, 200), random_x(rng, 200), poisoned(33)
    x *= np.float32(size)
    projection.project_token(weight.codes, weight.scales, x[None], y[None], False)
    check_close(y, weight.values @ x.astype(np.float64), tolerance(roundings(200)), magnitude(x, weight))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_one_token_through_float16(rng: np.random.Generator, in_features: int, accumulate: bool) -> None:
    weight, x = random_fp16(rng, 67, in_features), random_x(rng, in_features)
    y = rng.standard_normal(67).astype(np.float32) if accumulate else poisoned(67)
    expected = weight.values @ x.astype(np.float64) + (y if accumulate else 0)
    size = magnitude(x, weight) + (np.abs(y) if accumulate else 0)
    projection.project_token(weight.codes, None, x[None], y[None], accumulate)
    check_close(y, expected, tolerance(roundings(in_features)), size)


@pytest.mark.parametrize("tokens", [1, 5, 65])
@pytest.mark.parametrize("in_features", [1, 129, 576])
def test_a_chunk_through_float16(rng: np.random.Generator, in_features: int, tokens: int) -> None:
    weight, x, y = random_fp16(rng, 700, in_features), random_x(rng, tokens, in_features), poisoned(tokens, 700)
    projection.project_chunk(weight.codes, None, x, y, False, scratch())
    check_close(y, x.astype(np.float64) @ weight.values.T, tolerance(roundings(in_features)), magnitude(x, weight))


def test_every_single_weight_is_seen(rng: np.random.Generator) -> None:
    """One column at a time: the result is that column, to a rounding of its product."""
    weight, y = random_weight(rng, 3, 147), poisoned(3)
    for k in range(147):  # a whole group, two vectors, three single elements
        x = np.zeros(147, np.float32)
        x[k] = 1.0
        projection.project_token(weight.codes, weight.scales, x[None], y[None], False)
        np.testing.assert_allclose(y, weight.values[:, k], rtol=4 * 2.0**-24, err_msg=f"column {k}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_features", [7, 129, 200, 576])
def test_nan_and_infinity_in_x_show_in_every_row(rng: np.random.Generator, in_features: int, bad: float) -> None:
    weight = random_weight(rng, 5, in_features)
    for k in {0, in_features // 2, in_features - 1}:
        x, y = random_x(rng, in_features), np.zeros(5, np.float32)
        x[k] = bad
        projection.project_token(weight.codes, weight.scales, x[None], y[None], False)
        assert not np.isfinite(y).any(), f"column {k}: {y}"


@pytest.mark.parametrize("rows", [1, 2, 67])
@pytest.mark.parametrize("in_features", [1, 9, 136, 200, 576])
def test_one_token_through_swiglu(rng: np.random.Generator, in_features: int, rows: int) -> None:
    weight, x, y = random_weight(rng, 2 * rows, in_features), random_x(rng, in_features), poisoned(rows)
    x /= np.float32(np.sqrt(in_features))  # gate and up of about 1, as in a model
    both = weight.values @ x.astype(np.float64)
    gate, up = both[:rows], both[rows:]
    size = magnitude(x, weight)
    projection.project_token_swiglu(weight.codes, weight.scales, x[None], y[None])
    # silu's slope is below 1.1, and its exponential is good to 5 roundings
    spread = 1.1 * size[:rows] * np.abs(up) + np.abs(gate) * size[rows:] + size[:rows] * size[rows:]
    check_close(y, silu_reference(gate) * up, tolerance(roundings(in_features) + 25), spread)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", ["fp8", "float16"])
@pytest.mark.parametrize(("rows", "in_features"), [(1, 1), (67, 147), (5, 1280), (130, 576)])
def test_few_tokens_have_the_bits_of_one(
    rng: np.random.Generator, rows: int, in_features: int, kind: str, accumulate: bool
) -> None:
    weight, x = random_weight(rng, rows, in_features), random_x(rng, 8, in_features)
    codes, scales = (
        (weight.codes, weight.scales) if kind == "fp8" else (random_fp16(rng, rows, in_features).codes, None)
    )
    start = rng.standard_normal((8, rows)).astype(np.float32) if accumulate else poisoned(8, rows)
    single = start.copy()
    for t in range(8):
        projection.project_token(codes, scales, x[t : t + 1], single[t : t + 1], accumulate)
    for tokens in range(2, 9):
        y = start[:tokens].copy()
        projection.project_tokens(codes, scales, x[:tokens], y, accumulate)
        np.testing.assert_array_equal(y, single[:tokens])


@pytest.mark.parametrize(("rows", "in_features"), [(1, 9), (67, 147), (33, 576)])
def test_few_tokens_through_swiglu_have_the_bits_of_one(rng: np.random.Generator, rows: int, in_features: int) -> None:
    weight, x, single = random_weight(rng, 2 * rows, in_features), random_x(rng, 8, in_features), poisoned(8, rows)
    for t in range(8):
        projection.project_token_swiglu(weight.codes, weight.scales, x[t : t + 1], single[t : t + 1])
    for tokens in range(2, 9):
        y = poisoned(tokens, rows)
        projection.project_tokens_swiglu(weight.codes, weight.scales, x[:tokens], y)
        np.testing.assert_array_equal(y, single[:tokens])


def test_a_wide_gate_saturates(rng: np.random.Generator) -> None:
    """silu of gates of -1000 is 0 and of 1000 the gate itself: the exponential is clamped at both ends."""
    x, y = np.full((1, 16), 1.0, np.float32), poisoned(1, 2)
    values = np.repeat(np.float32([[-448.0], [448.0], [1.0], [1.0]]), 16, axis=1)
    codes, scales = quantize_groups(values)
    projection.project_token_swiglu(codes.view(np.int8), scales, x, y)
    np.testing.assert_allclose(y, [[0.0, 16 * 448.0 * 16]], atol=1e-30)


# --- many tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("rows", "in_features"), [(1, 1), (3, 129), (320, 200), (321, 128), (641, 9), (645, 576)])
def test_a_chunk(rng: np.random.Generator, rows: int, in_features: int, tokens: int, accumulate: bool) -> None:
    weight, x = random_weight(rng, rows, in_features), random_x(rng, tokens, in_features)
    y = rng.standard_normal((tokens, rows)).astype(np.float32) if accumulate else poisoned(tokens, rows)
    expected = x.astype(np.float64) @ weight.values.T + (y if accumulate else 0)
    size = magnitude(x, weight) + (np.abs(y) if accumulate else 0)
    projection.project_chunk(weight.codes, weight.scales, x, y, accumulate, scratch())
    check_close(y, expected, tolerance(roundings(in_features)), size)


def test_a_chunk_keeps_nan_in_its_own_row(rng: np.random.Generator) -> None:
    weight, x, y = random_weight(rng, 200, 136), random_x(rng, 9, 136), poisoned(9, 200)
    x[4, 135] = np.nan
    projection.project_chunk(weight.codes, weight.scales, x, y, False, scratch())
    assert np.isnan(y[4]).all()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()


@pytest.mark.parametrize("tokens", [1, 5, 65, 530])
@pytest.mark.parametrize(("rows", "in_features"), [(1, 9), (33, 200), (150, 576), (40, 900)])
def test_a_chunk_through_swiglu(rng: np.random.Generator, rows: int, in_features: int, tokens: int) -> None:
    weight, x = random_weight(rng, 2 * rows, in_features), random_x(rng, tokens, in_features)
    y = poisoned(tokens, rows)
    x /= np.float32(np.sqrt(in_features))  # gate and up of about 1, as in a model
    both, size = x.astype(np.float64) @ weight.values.T, magnitude(x, weight)
    gate, up = both[:, :rows], both[:, rows:]
    projection.project_chunk_swiglu(weight.codes, weight.scales, x, y, scratch())
    spread = 1.1 * size[:, :rows] * np.abs(up) + np.abs(gate) * size[:, rows:] + size[:, :rows] * size[:, rows:]
    check_close(y, silu_reference(gate) * up, tolerance(roundings(in_features) + 25), spread)


@pytest.mark.parametrize("threads", [1, 5])
def test_bits_do_not_depend_on_the_chunk_or_on_the_threads(rng: np.random.Generator, threads: int) -> None:
    """Also not on how many pieces a chunk is cut into for many threads, of which only as many as there are run."""
    weight, x = random_weight(rng, 130, 900), random_x(rng, 560, 900)
    whole, fused = poisoned(560, 130), poisoned(560, 65)
    projection.project_chunk(weight.codes, weight.scales, x, whole, False, scratch())
    projection.project_chunk_swiglu(weight.codes, weight.scales, x, fused, scratch())
    memory = poisoned(max(threads, numba.config.NUMBA_NUM_THREADS), projection.chunk_scratch())
    for first, stop in ((0, 1), (0, 200), (200, 560), (3, 20), (555, 560)):
        y, z = poisoned(stop - first, 130), poisoned(stop - first, 65)
        projection.project_chunk(weight.codes, weight.scales, x[first:stop], y, False, memory)
        projection.project_chunk_swiglu(weight.codes, weight.scales, x[first:stop], z, memory)
        np.testing.assert_array_equal(y, whole[first:stop])
        np.testing.assert_array_equal(z, fused[first:stop])


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 129), (65, 320)])
def test_swiglu_of_a_chunk(rng: np.random.Generator, tokens: int, width: int) -> None:
    gate_up, y = random_x(rng, tokens, 2 * width), poisoned(tokens, width)
    gate_up *= 10
    projection.swiglu(gate_up, y)
    gate, up = gate_up[:, :width].astype(np.float64), gate_up[:, width:].astype(np.float64)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(y, expected, rtol=tolerance(25), atol=1e-37)


# --- sensitivity of the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake", ["scales of the next group", "last column dropped", "sign of a column", "bfloat16 inputs"]
)
def test_a_mistake_is_far_outside_the_tolerance(rng: np.random.Generator, mistake: str) -> None:
    weight, x = random_weight(rng, 67, 300), random_x(rng, 5, 300)
    expected, size = x.astype(np.float64) @ weight.values.T, magnitude(x, weight)
    codes, scales = weight.codes.copy(), weight.scales.copy()
    given = x
    if mistake == "scales of the next group":
        scales = np.ascontiguousarray(np.roll(scales, 1, axis=1))
    elif mistake == "last column dropped":
        given = x.copy()
        given[:, -1] = 0
    elif mistake == "sign of a column":
        codes[:, 17] ^= np.int8(-128)
    else:
        given = (x.view(np.uint32) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    y, one = poisoned(5, 67), poisoned(67)
    projection.project_chunk(codes, scales, given, y, False, scratch())
    projection.project_token(codes, scales, given[0][None], one[None], False)
    assert relative_l2(y, expected, size) > 20 * tolerance(roundings(300))
    assert relative_l2(one, expected[0], size[0]) > 20 * tolerance(roundings(300))
