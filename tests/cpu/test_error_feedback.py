"""Rounding with error feedback: the codes of the definition, and outputs that change less."""

import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.ops.error_feedback import round_with_feedback, round_with_feedback_reference
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups
from numba_atomflow.quantize.inputs import output_energy

pytestmark = pytest.mark.usefixtures("single_threaded_blas")


def correlated_gram(rng: np.random.Generator, width: int) -> NDArray[np.float32]:
    x = rng.standard_normal((3 * width, width)) @ (np.eye(width) + 0.3 * rng.standard_normal((width, width)))
    return (x.T @ x / len(x)).astype(np.float32)


@pytest.mark.parametrize(("rows", "in_features"), [(1, 1), (2, 64), (70, 129), (5, 300)])
def test_codes_are_those_of_the_definition(rng: np.random.Generator, rows: int, in_features: int) -> None:
    weights, gram = rng.standard_normal((rows, in_features), np.float32), correlated_gram(rng, in_features)
    scales = quantize_groups(weights)[1]
    got = round_with_feedback(weights, scales, gram)
    expected = round_with_feedback_reference(weights.astype(np.float64), scales, gram.astype(np.float64))
    # In float32 a weight may fall on the other side of a tie, and then all that make up for it.
    assert (got != expected).mean() < 0.02
    ours, theirs = (output_energy(weights - dequantize_groups(codes, scales), gram) for codes in (got, expected))
    assert ours == pytest.approx(theirs, rel=0.05, abs=1e-9)


def test_outputs_change_less_than_with_plain_rounding(rng: np.random.Generator) -> None:
    weights, gram = rng.standard_normal((40, 300), np.float32), correlated_gram(rng, 300)
    codes, scales = quantize_groups(weights)
    fed_back = round_with_feedback(weights, scales, gram)
    plain, better = (output_energy(weights - dequantize_groups(c, scales), gram) for c in (codes, fed_back))
    assert better < 0.8 * plain


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_inputs_that_do_not_span_all_directions(rng: np.random.Generator, rank: int) -> None:
    x = rng.standard_normal((rank, 200)).astype(np.float32)
    weights = rng.standard_normal((9, 200), np.float32)
    scales = quantize_groups(weights)[1]
    codes = round_with_feedback(weights, scales, x.T @ x)
    assert not ((codes & 0x7F) == 0x7F).any()  # no NaN
    assert np.abs(weights - dequantize_groups(codes, scales)).max() < 10


def test_the_weights_are_left_alone(rng: np.random.Generator) -> None:
    weights = rng.standard_normal((9, 200), np.float32)
    before = weights.copy()
    round_with_feedback(weights, quantize_groups(weights)[1], correlated_gram(rng, 200))
    np.testing.assert_array_equal(weights, before)
