"""Tests on a GPU: skipped, with the reason, where there is none."""

import os

import pytest

from numba_atomflow.backends.choose import gpu_is_usable

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator replaces the compiler in this process", allow_module_level=True)


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not gpu_is_usable():
        pytest.skip("no CUDA GPU (or its driver, or its libraries: extra cu13)")
