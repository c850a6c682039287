"""Searched group scales: those of the reference, and never worse than absmax / 448 on what they were searched for."""

import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import dequantize_groups, encode_groups, quantize_groups
from numba_atomflow.ops.scale_search import COARSE_FACTORS, FACTORS, search_scales, search_scales_reference

pytestmark = pytest.mark.usefixtures("single_threaded_blas")


def correlated_gram(rng: np.random.Generator, width: int) -> NDArray[np.float32]:
    """Mean of x x^T over inputs whose channels depend on each other and differ in size."""
    x = rng.standard_normal((3 * width, width)) @ rng.standard_normal((width, width))
    x *= np.exp(rng.uniform(-2, 2, width))
    return (x.T @ x / len(x)).astype(np.float32)


def group_costs(
    weights: NDArray[np.float32], scales: NDArray[np.float32], gram: NDArray[np.float32]
) -> NDArray[np.float64]:
    """e G e^T of every row and group."""
    errors = (weights - dequantize_groups(encode_groups(weights, scales), scales)).astype(np.float64)
    costs = np.empty(scales.shape)
    for g in range(scales.shape[1]):
        group = slice(g * 128, (g + 1) * 128)
        own = errors[:, group]
        costs[:, g] = np.einsum("nk,nk->n", own @ gram[group, group].astype(np.float64), own)
    return costs


@pytest.mark.parametrize(("rows", "in_features"), [(1, 1), (3, 127), (65, 200), (130, 384)])
@pytest.mark.parametrize("factors", [FACTORS, COARSE_FACTORS])
def test_the_reference_finds_no_better_scales(
    rng: np.random.Generator, rows: int, in_features: int, factors: tuple[np.float32, ...]
) -> None:
    weights, gram = rng.standard_normal((rows, in_features), np.float32), correlated_gram(rng, in_features)
    got = group_costs(weights, search_scales(weights, gram, factors), gram)
    scales = search_scales_reference(weights.astype(np.float64), gram.astype(np.float64), factors)
    np.testing.assert_allclose(got, group_costs(weights, scales, gram), rtol=1e-3)  # candidates may be that close


def test_no_group_gets_worse_and_most_get_much_better(rng: np.random.Generator) -> None:
    weights, gram = rng.standard_normal((100, 300), np.float32), correlated_gram(rng, 300)
    before = group_costs(weights, quantize_groups(weights)[1], gram)
    after = group_costs(weights, search_scales(weights, gram), gram)
    assert (after <= before * 1.001).all()
    assert after.sum() < 0.8 * before.sum()


def test_groups_of_zeros_and_of_the_largest_weights(rng: np.random.Generator) -> None:
    weights = np.zeros((3, 256), np.float32)
    weights[1, 128:], weights[2] = 65504.0, rng.standard_normal(256)
    scales = search_scales(weights, correlated_gram(rng, 256))
    assert (scales[0].tolist(), scales[1, 0]) == ([1.0, 1.0], 1.0)
    assert scales.max() < 256  # what kernels count on
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


def test_encoding_under_given_scales_saturates() -> None:
    weights = np.array([[1000.0, -1000.0, 448.0, 1.0]], np.float32)
    codes = encode_groups(weights, np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(dequantize_groups(codes, np.ones((1, 1), np.float32)), [[448.0, -448.0, 448.0, 1.0]])
