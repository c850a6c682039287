"""Tests on a GPU: skipped, with the reason, where there is none."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Decode
from numba_atomflow.backends.choose import gpu_is_usable
from numba_atomflow.device.driver import DriverError

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator replaces the compiler in this process", allow_module_level=True)

_lost_by: list[str] = []  # the test after which this process cannot use the GPU any more


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not gpu_is_usable():
        pytest.skip("no CUDA GPU (or its driver, or its libraries: extra cu13)")


@pytest.fixture(scope="module", params=["graph", "persistent"])
def decode(request: pytest.FixtureRequest) -> Decode:
    """Each way of running decode steps."""
    from device_launch import capability  # cannot be imported where numba-cuda is not installed

    path: Decode = request.param
    if path == "persistent" and capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")
    return path


@pytest.fixture(scope="module")
def engine_of_each_path(decode: Decode) -> Iterator[Engine]:
    """A tiny random model on the GPU, with a context of 96 tokens."""
    with Engine.random(tiny_geometry(), "cuda", 96, decode=decode) as engine:
        yield engine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Take note of a test that lost the GPU's context."""
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, DriverError) and error.final:
        _lost_by.append(item.nodeid)
    return (yield)


@pytest.fixture(autouse=True)
def _usable(_gpu: None) -> None:
    """After an illegal address every test of this process would fail. pytest-xdist replaces a worker that ends."""
    if _lost_by:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os.abort()
        pytest.exit(f"{_lost_by[0]} lost the GPU's context; run the others in a process of their own", returncode=1)
