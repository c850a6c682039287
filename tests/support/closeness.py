"""Tolerances of float32 results."""

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT = 2.0**-24  # unit roundoff of float32
LAMBDA = 4.0


def tolerance(roundings: float) -> float:
    """Relative error allowed after a chain of `roundings` float32 operations.

    Rounding errors are modelled as independent: n of them are below lambda * sqrt(n) * u with probability
    1 - 2 exp(-lambda^2 / 2) for one result, and with a higher one for the mean over many results. Source: Higham and
    Mary, "A New Approach to Probabilistic Rounding Error Analysis" (2019).
    """
    return LAMBDA * UNIT * float(np.sqrt(roundings))


def relative_l2(actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike | None = None) -> float:
    """|actual - expected| / |magnitude|; `magnitude` defaults to `expected`; set it where sums may cancel."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    size = np.linalg.norm(np.asarray(expected if magnitude is None else magnitude, np.float64))
    return float(np.linalg.norm(difference) / size) if size else float(np.linalg.norm(difference))


def check_close(
    actual: NDArray[np.float32], expected: ArrayLike, allowed: float, magnitude: ArrayLike | None = None
) -> None:
    """Same shape, no NaN or infinity, relative L2 at most `allowed`."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    invalid = np.count_nonzero(~np.isfinite(actual))
    assert not invalid, f"{invalid} of {actual.size} values are NaN or infinite"
    error = relative_l2(actual, expected, magnitude)
    assert error <= allowed, f"relative L2 {error:.3g} is {error / allowed:.1%} of the tolerance {allowed:.3g}"


def fresh_rng() -> np.random.Generator:
    """A generator with a new seed, which is printed: set NUMBA_ATOMFLOW_TEST_SEED to repeat a failure."""
    seed = int(os.environ.get("NUMBA_ATOMFLOW_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"NUMBA_ATOMFLOW_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def poisoned(*shape: int) -> NDArray[np.float32]:
    """Float32 memory filled with NaN, to detect elements that a kernel does not write, or reads before writing."""
    return np.full(shape, np.nan, np.float32)
