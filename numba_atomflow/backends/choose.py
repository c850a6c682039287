"""Which backend runs a model: the GPU where there is a usable one, else the CPU."""

from collections.abc import Mapping
from typing import Any, Literal

from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.driver import Device
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry

BackendName = Literal["auto", "cpu", "cuda"]
NAMES = ("auto", "cpu", "cuda")


def check_name(name: str) -> None:
    """Raises:
    BackendError: there is no such backend.
    """
    if name not in NAMES:
        raise BackendError(f"There is no backend {name!r}; choose auto, cpu or cuda.")


def gpu_is_usable() -> bool:
    """Whether this machine has a GPU, a driver, the bindings and the compiler that the CUDA backend needs."""
    device = _usable_gpu()
    if device is None:
        return False
    device.close()
    return True


def _usable_gpu() -> Device | None:
    """The GPU, opened; None where there is none, or no compiler for it (the extras cu12 and cu13 bring it)."""
    from numba_atomflow.driver import open_device

    try:
        device = open_device()
    except BackendError:
        return None
    from numba_atomflow.ops.cuda.build import missing_compiler

    if missing_compiler():
        device.close()
        return None
    return device


def make_backend(
    name: BackendName,
    geometry: ModelGeometry,
    weights: Mapping[str, NDArray[Any]],
    max_seq_len: int,
    threads: int | None = None,
) -> Backend:
    """A backend for a model; `prepare` it before use.

    Args:
        name: "auto" takes the GPU if there is a usable one and no number of threads is given.
        weights: the checkpoint's arrays by name, possibly made only when they are asked for.
        threads: of the CPU backend.

    Raises:
        BackendError: the backend cannot run here.
        OptionError: threads are given for the GPU, or there are not that many cores.
    """
    check_name(name)
    if name == "cuda" and threads is not None:
        raise OptionError("--threads is for the CPU backend; leave it out, or use --backend cpu.")
    # numba is slow to import: not before it is needed.
    device = _usable_gpu() if name == "auto" and threads is None else None
    if name == "cuda" or device is not None:
        from numba_atomflow.backends.cuda.backend import CudaBackend

        try:
            return CudaBackend(geometry, weights, max_seq_len)
        finally:
            if device is not None:  # it was kept open, so that its context need not be made twice
                device.close()
    from numba_atomflow.backends.cpu import CpuBackend

    return CpuBackend(geometry, dict(weights), max_seq_len, threads)
