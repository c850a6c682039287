"""Which backend runs a model: the GPU where there is a usable one, else the CPU."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Decode
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry

if TYPE_CHECKING:
    from numba_atomflow.device.resources import DeviceResources

BackendName = Literal["auto", "cpu", "cuda"]
NAMES = ("auto", "cpu", "cuda")


def check_name(name: str) -> None:
    """Raises:
    BackendError: there is no such backend.
    """
    if name not in NAMES:
        raise BackendError(f"There is no backend {name!r}; choose auto, cpu or cuda.")


def check_decode(decode: str, backend: BackendName, threads: int | None) -> None:
    """Raises:
    OptionError: there is no such way to run decode steps, or the choice is the GPU's, and the CPU was asked for.
    """
    if decode not in get_args(Decode):
        raise OptionError(f"--decode {decode} does not exist; choose auto, graph or persistent.")
    if decode != "auto" and backend == "cpu":
        raise OptionError(f"--decode {decode} is for the CUDA backend; leave it out, or use --backend cuda.")
    if decode != "auto" and threads is not None:
        raise OptionError(f"--threads is for the CPU backend and --decode {decode} for the CUDA one; leave one out.")


def gpu_is_usable() -> bool:
    """Whether this machine has a GPU, a driver, the bindings and the compiler that the CUDA backend needs."""
    from numba_atomflow.device.resources import DeviceResources

    with DeviceResources() as probe:
        return _opened(probe)


def _opened(probe: "DeviceResources") -> bool:
    """Open the GPU; whether there is one, and the compiler for it (the extras cu12 and cu13 bring it)."""
    try:
        probe.open()
    except BackendError:
        return False
    from numba_atomflow.ops.cuda.runtime.build import missing_compiler

    return missing_compiler() is None


def make_backend(
    name: BackendName,
    geometry: ModelGeometry,
    weights: Mapping[str, NDArray[Any]],
    max_seq_len: int,
    threads: int | None = None,
    decode: Decode = "auto",
    check_weights: Callable[[], None] = lambda: None,
) -> Backend:
    """A backend for a model; `prepare` it before use.

    Args:
        name: "auto" takes the GPU if there is a usable one and no number of threads is given.
        weights: the checkpoint's arrays by name, possibly made only when they are asked for.
        threads: of the CPU backend.
        decode: of the CUDA backend; anything but "auto" asks for that backend.
        check_weights: raises if the arrays are not what they were; asked by a backend that reads them at every step.

    Raises:
        BackendError: the backend cannot run here.
        OptionError: threads are given for the GPU or `decode` for the CPU, or there are not that many cores.
    """
    check_name(name)
    check_decode(decode, name, threads)
    if decode != "auto":
        name = "cuda"
    if name == "cuda" and threads is not None:
        raise OptionError("--threads is for the CPU backend; leave it out, or use --backend cpu.")
    if name == "cuda" or (name == "auto" and threads is None):
        from numba_atomflow.device.resources import DeviceResources  # the CPU backend does without

        with DeviceResources() as probe:  # kept open meanwhile, so that the context need not be made twice
            if name == "cuda" or _opened(probe):
                from numba_atomflow.backends.cuda.backend import CudaBackend

                return CudaBackend(geometry, weights, max_seq_len, decode=decode)
    from numba_atomflow.backends.cpu import CpuBackend

    return CpuBackend(geometry, dict(weights), max_seq_len, threads, check_weights=check_weights)
