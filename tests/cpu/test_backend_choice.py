"""Which backend, and which GPU, an engine takes."""

from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.choose import BackendChoice
from numba_atomflow.errors import BackendError, OptionError

GEOMETRY = tiny_geometry(layers=1)


@pytest.mark.parametrize(
    ("options", "needs_gpu", "allows_gpu"),
    [
        ({}, False, True),
        ({"name": "cpu"}, False, False),
        ({"name": "cuda"}, True, True),
        ({"threads": 2}, False, False),
        ({"decode": "graph"}, True, True),
        ({"device_ordinal": 1}, True, True),
    ],
    ids=str,
)
def test_what_a_choice_requires(options: dict[str, Any], needs_gpu: bool, allows_gpu: bool) -> None:
    choice = BackendChoice(**options)
    assert (choice.needs_gpu, choice.allows_gpu) == (needs_gpu, allows_gpu)


@pytest.mark.parametrize("options", [{"backend": "cpu"}, {"threads": 2}, {"backend": "cpu", "threads": 1}], ids=str)
def test_a_gpu_is_not_for_the_cpu_backend(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="device 1 is a GPU; leave it out, or use the CUDA backend"):
        Engine.random(GEOMETRY, device=1, **options)


@pytest.mark.parametrize("device", [1.5, "first", True])
def test_a_device_is_a_whole_number(device: Any) -> None:
    with pytest.raises(OptionError, match="device"):
        Engine.random(GEOMETRY, device=device)


@pytest.mark.parametrize("backend", ["auto", "cuda"])
def test_an_engine_takes_the_gpu_with_the_given_number(
    pretended: PretendedDriver, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
    pytest.importorskip("numba_cuda", reason="the CUDA backend is made of it; there is none for macOS")
    pretend_compiler(monkeypatch)
    pretended.gpus = 2
    for device in (0, 1):
        with Engine.random(GEOMETRY, backend, 8, device=device) as engine:
            assert engine.backend._gpu.ordinal == device  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="There is no GPU number 2"):
        Engine.random(GEOMETRY, backend, 8, device=2)


@pytest.mark.parametrize(
    ("gpus", "ordinals"), [(2, (0, 1)), (np.int64(2), (0, 1)), ([3, np.int64(1)], (3, 1)), ((2,), (2,))], ids=str
)
def test_gpus_as_a_number_or_a_list(gpus: Any, ordinals: tuple[int, ...]) -> None:
    assert BackendChoice(gpus=gpus).gpu_ordinals == ordinals


@pytest.mark.parametrize("gpus", [0, True, 1.0, None, "2", [], {0, 1}, np.array([0, 1]), 9, 10**30, [0.5]], ids=str)
def test_other_gpus_are_refused_at_once(gpus: Any) -> None:
    with pytest.raises(OptionError, match=r"gpus is|among 2 to 8 GPUs|a GPU of gpus"):
        BackendChoice(gpus=gpus)
