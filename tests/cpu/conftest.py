"""Fixtures of the tests that need nothing but a CPU."""

from collections.abc import Iterator

import numpy as np
import pytest
from closeness import fresh_rng
from pretended_gpu import PretendedDriver
from threadpoolctl import ThreadpoolController


@pytest.fixture
def rng() -> np.random.Generator:
    """Other random numbers in every run."""
    return fresh_rng()


@pytest.fixture
def single_threaded_blas() -> Iterator[None]:
    """What block kernels ask of their caller."""
    import scipy.linalg.cython_blas  # noqa: F401 - the BLAS that compiled code calls

    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDriver]:
    """The process's GPU, in a test that must give everything back."""
    gpu = PretendedDriver().install(monkeypatch)
    yield gpu
    gpu.behave()
    gpu.assert_used_well()
    assert gpu.counts() == {}
