"""The backend that runs a model: a GPU where there is a usable one, else the CPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Decode
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.utils.arguments import whole_number

if TYPE_CHECKING:
    from numba_atomflow.device.resources import DeviceResources

BackendName = Literal["auto", "cpu", "cuda"]
NAMES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class BackendChoice:
    """The requested backend.

    Attributes:
        name: "auto" takes the GPU if there is a usable one, unless threads are given.
        threads: of the CPU backend.
        decode: of the CUDA backend; anything but "auto" requires that backend.
        device_ordinal: which GPU, from 0; anything but 0 requires the CUDA backend.

    Raises:
        BackendError: there is no such backend.
        OptionError: there is no such way to run decode steps, or options of one backend are given for the other.
    """

    name: BackendName = "auto"
    threads: int | None = None
    decode: Decode = "auto"
    device_ordinal: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise BackendError(f"There is no backend {self.name!r}; choose auto, cpu or cuda.")
        if self.decode not in get_args(Decode):
            raise OptionError(f"--decode {self.decode} does not exist; choose auto, graph or persistent.")
        if self.decode != "auto" and self.name == "cpu":
            raise OptionError(f"--decode {self.decode} is for the CUDA backend; leave it out, or use --backend cuda.")
        if self.decode != "auto" and self.threads is not None:
            raise OptionError(
                f"--threads is for the CPU backend and --decode {self.decode} for the CUDA one; leave one out."
            )
        if whole_number("device", self.device_ordinal) != 0 and (self.name == "cpu" or self.threads is not None):
            raise OptionError(f"device {self.device_ordinal} is a GPU; leave it out, or use the CUDA backend.")

    @property
    def needs_gpu(self) -> bool:
        """Whether only the CUDA backend will do."""
        return self.name == "cuda" or self.decode != "auto" or self.device_ordinal != 0

    @property
    def allows_gpu(self) -> bool:
        """Whether the CUDA backend may be taken."""
        return self.needs_gpu or (self.name == "auto" and self.threads is None)


def gpu_is_usable() -> bool:
    """Whether this machine has a GPU, a driver, the bindings and the compiler that the CUDA backend needs."""
    from numba_atomflow.device.resources import DeviceResources

    with DeviceResources() as probe:
        return _opened(probe)


def _opened(probe: "DeviceResources") -> bool:
    """Open the GPU; whether there is one, and the compiler for it (from the extras cu12 and cu13)."""
    try:
        probe.open()
    except BackendError:
        return False
    from numba_atomflow.ops.cuda.runtime.build import missing_compiler

    return missing_compiler() is None


def make_backend(
    choice: BackendChoice,
    geometry: ModelGeometry,
    weights: Mapping[str, NDArray[Any]],
    max_seq_len: int,
    check_weights: Callable[[], None] = lambda: None,
) -> Backend:
    """A backend for a model; `prepare` it before use.

    Args:
        weights: the checkpoint's arrays by name; each may be generated when it is looked up.
        check_weights: raises if the arrays have changed; called by a backend that reads them at every step.

    Raises:
        BackendError: the backend cannot run here.
        OptionError: threads are given for the GPU, or there are not that many cores.
    """
    if choice.needs_gpu and choice.threads is not None:
        raise OptionError("--threads is for the CPU backend; leave it out, or use --backend cpu.")
    if choice.allows_gpu:
        from numba_atomflow.device.resources import DeviceResources  # the CPU backend does without

        with DeviceResources() as probe:  # kept open meanwhile, so that the context is not created twice
            if choice.needs_gpu or _opened(probe):
                from numba_atomflow.backends.cuda.backend import CudaBackend

                ordinal = choice.device_ordinal
                return CudaBackend(geometry, weights, max_seq_len, device_ordinal=ordinal, decode=choice.decode)
    from numba_atomflow.backends.cpu import CpuBackend

    return CpuBackend(geometry, dict(weights), max_seq_len, choice.threads, check_weights=check_weights)
