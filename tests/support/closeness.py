"""How far two float32 results may be apart, and what is said when they are further."""

import os

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT = 2.0**-24  # a float32 operation rounds to within this, relatively
LAMBDA = 4.0


def tolerance(roundings: float) -> float:
    """Relative error allowed after a chain of `roundings` float32 operations.

    Rounding errors are as good as independent, so n of them add up like a random walk: below lambda * sqrt(n) * u with
    probability 1 - 2 exp(-lambda^2 / 2) for one result, and far more surely in the mean over many. Source: Higham and
    Mary, "A New Approach to Probabilistic Rounding Error Analysis" (2019).
    """
    return LAMBDA * UNIT * float(np.sqrt(roundings))


def relative_l2(actual: ArrayLike, expected: ArrayLike, magnitude: ArrayLike | None = None) -> float:
    """|actual - expected| / |magnitude|; `magnitude` is `expected`, unless sums in that may have cancelled out."""
    difference = np.asarray(actual, np.float64) - np.asarray(expected, np.float64)
    size = np.linalg.norm(np.asarray(expected if magnitude is None else magnitude, np.float64))
    return float(np.linalg.norm(difference) / size) if size else float(np.linalg.norm(difference))


def check_close(
    actual: NDArray[np.float32], expected: ArrayLike, allowed: float, magnitude: ArrayLike | None = None
) -> None:
    """Same shape, no NaN or infinity, relative L2 at most `allowed`."""
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    broken = np.count_nonzero(~np.isfinite(actual))
    assert not broken, f"{broken} of {actual.size} values are NaN or infinite"
    error = relative_l2(actual, expected, magnitude)
    assert error <= allowed, f"relative L2 {error:.3g} is {error / allowed:.1%} of the tolerance {allowed:.3g}"


def fresh_rng() -> np.random.Generator:
    """Random numbers from a new seed, printed so that a failure can be repeated with NUMBA_ATOMFLOW_TEST_SEED."""
    seed = int(os.environ.get("NUMBA_ATOMFLOW_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"NUMBA_ATOMFLOW_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def poisoned(*shape: int) -> NDArray[np.float32]:
    """Float32 memory full of NaN: what a kernel leaves unwritten, or reads without having written, shows."""
    return np.full(shape, np.nan, np.float32)
