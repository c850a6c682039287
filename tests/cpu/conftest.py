"""Fixtures of the CPU tests."""

from collections.abc import Iterator

import numpy as np
import pytest
from closeness import fresh_rng
from pretended_gpu import PretendedDriver
from threadpoolctl import ThreadpoolController


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a new seed in every run."""
    return fresh_rng()


@pytest.fixture
def single_threaded_blas() -> Iterator[None]:
    """BLAS on one thread, which kernels of several tokens require."""
    import scipy.linalg.cython_blas  # noqa: F401 - the BLAS that compiled code calls

    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDriver]:
    """A simulated GPU; the test must release all its resources."""
    gpu = PretendedDriver().install(monkeypatch)
    yield gpu
    gpu.behave()
    gpu.assert_used_well()
    assert gpu.counts() == {}
