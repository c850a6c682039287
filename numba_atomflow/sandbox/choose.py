"""Which device the sandbox runs on."""

from collections.abc import Mapping
from typing import Any, Literal

from numpy.typing import NDArray

from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sandbox.runner import CacheSizes, Runner


def make_runner(
    device: Literal["auto", "cpu", "cuda"],
    geometry: ModelGeometry,
    weights: Mapping[str, NDArray[Any]],
    sizes: CacheSizes,
    threads: int | None = None,
) -> Runner:
    """A runner for a model; `prepare` it before use.

    Args:
        weights: the checkpoint's arrays by name, which must stay mapped.
        threads: of the CPU; with "auto", naming them chooses it.

    Raises:
        BackendError: the device cannot be used here.
        OptionError: threads are given for the GPU, or there are not that many cores; no kernels for this model.
    """
    if device == "cuda":
        raise BackendError("The sandbox runs on the CPU so far; use --backend cpu.")
    from numba_atomflow.sandbox.cpu_runner import CpuRunner

    return CpuRunner(geometry, dict(weights), sizes, threads)
