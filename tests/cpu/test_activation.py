"""The exponential and SiLU against float64, over all of their range."""

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from numba_atomflow.ops import activation


@numba.njit
def exp_of(x, y):
    for i in range(x.size):
        y[i] = activation.exp(x[i])


@numba.njit
def silu_of(x, y):
    for i in range(x.size):
        y[i] = activation.silu(x[i])


def apply(function, x: NDArray[np.float32]) -> NDArray[np.float32]:
    y = np.full_like(x, np.nan)
    function(x, y)
    return y


ERROR = 5e-7  # the series ends after r^6 / 720: r^7 / 5040 / e^r is 1.7e-7 at r = -ln(2) / 2; and five roundings


def test_exp_is_as_good_as_it_says_everywhere() -> None:
    x = np.linspace(-87, 88, 1 << 21).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = np.abs(apply(exp_of, x) - exact) / exact
    assert error.max() <= ERROR, f"{error.max()} at {x[error.argmax()]}"


def test_exp_of_special_values() -> None:
    x = np.array([0.0, -0.0, -1e30, -np.inf, 1e30, np.inf], np.float32)
    y = apply(exp_of, x)
    assert y[:2].tolist() == [1.0, 1.0]
    np.testing.assert_allclose(y[2:], np.exp([-87.0, -87.0, 88.0, 88.0]), rtol=ERROR)
    assert np.isnan(apply(exp_of, np.full(11, np.nan, np.float32))).all()


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_silu(rng: np.random.Generator, size: float) -> None:
    x = (rng.standard_normal(10_001) * size).astype(np.float32)
    exact = x / (1 + np.exp(-x.astype(np.float64)))
    np.testing.assert_allclose(apply(silu_of, x), exact, rtol=ERROR + 2 * 2.0**-24, atol=1e-36)
    np.testing.assert_allclose(activation.silu_reference(x.astype(np.float64)), exact, rtol=1e-15)


def test_silu_of_special_values() -> None:
    x = np.array([0.0, 100.0, -200.0, -1e4, np.nan], np.float32)
    y = apply(silu_of, x)
    assert y[:2].tolist() == [0.0, 100.0]
    np.testing.assert_allclose(y[2:4], 0, atol=1e-30)
    assert np.isnan(y[4])
