"""The choice of a device for the sandbox: the GPU if a usable one is there, else the CPU."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from numpy.typing import NDArray

from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sandbox.runner import CacheSizes, Runner


def make_runner(
    device: Literal["auto", "cpu", "cuda"],
    geometry: ModelGeometry,
    weights: Mapping[str, NDArray[Any]],
    sizes: CacheSizes,
    threads: int | None = None,
    check_weights: Callable[[], None] = lambda: None,
) -> Runner:
    """A runner for a model; call `prepare` before use.

    Args:
        weights: the checkpoint's arrays by name, which must stay mapped.
        threads: of the CPU; with "auto" and a number, the CPU is chosen.
        check_weights: raises if the arrays have changed; called by a runner that reads them at every step.

    Raises:
        BackendError: the device cannot be used here.
        OptionError: threads are given for the GPU, or are more than the cores; or there are no kernels for the model.
    """
    if device == "cuda" and threads is not None:
        raise OptionError("--threads is for the CPU; leave it out, or use --backend cpu.")
    if device == "cuda" or (device == "auto" and threads is None and _gpu_is_usable()):
        from numba_atomflow.sandbox.gpu_runner import GpuRunner

        return GpuRunner(geometry, weights, sizes)
    from numba_atomflow.sandbox.cpu_runner import CpuRunner

    return CpuRunner(geometry, dict(weights), sizes, threads, check_weights=check_weights)


def _gpu_is_usable() -> bool:
    try:
        with DeviceResources() as owner:
            owner.open()
    except BackendError:
        return False
    return True
