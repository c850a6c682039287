"""The backend that runs a model: a GPU where there is a usable one, else the CPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend, Decode, Prefill
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.sharding import check_ranks
from numba_atomflow.utils.arguments import one_of, whole_number

if TYPE_CHECKING:
    from numba_atomflow.device.resources import DeviceResources

BackendName = Literal["auto", "cpu", "cuda"]
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 1 << 14  # tokens of a prefill step on the GEMM path
NAMES = ("auto", "cpu", "cuda")
Gpus = int | Literal["all"] | Sequence[int]  # how many GPUs share a model, or which ones


@dataclass(frozen=True)
class BackendChoice:
    """The requested backend.

    Attributes:
        name: "auto" takes the GPU if there is a usable one, unless threads are given.
        threads: of the CPU backend.
        decode: of the CUDA backend; anything but "auto" requires that backend.
        device_ordinal: which GPU, from 0; anything but 0 requires the CUDA backend.
        prefill: of the CUDA backend; anything but "auto" requires that backend.
        prefill_chunk: most tokens of a prefill step on the GEMM path; None: its default; otherwise that backend is
            required.
        gpus: how many GPUs share the model, counted from `device_ordinal` on, or "all", or the numbers of these GPUs;
            anything but 1 requires the CUDA backend.

    Raises:
        BackendError: there is no such backend.
        OptionError: there is no such way to run decode steps or prompts, options of one backend are given for the
            other, or a chunk's size for a path without chunks.
    """

    name: BackendName = "auto"
    threads: int | None = None
    decode: Decode = "auto"
    device_ordinal: int = 0
    prefill: Prefill = "auto"
    prefill_chunk: int | None = None
    gpus: Gpus = 1

    def __post_init__(self) -> None:
        if not one_of(self.name, NAMES):
            raise BackendError(f"There is no backend {quote(self.name)}; choose auto, cpu or cuda.")
        if not one_of(self.decode, get_args(Decode)):
            raise OptionError(f"--decode {_shown(self.decode)} does not exist; choose auto, graph or persistent.")
        if not one_of(self.prefill, get_args(Prefill)):
            raise OptionError(f"--prefill {_shown(self.prefill)} does not exist; choose auto, gemv, gemm or fp8.")
        if self.prefill_chunk is not None:
            object.__setattr__(self, "prefill_chunk", whole_number("prefill_chunk", self.prefill_chunk))
        self._set_gpus()
        for option in self._gpu_options():
            if self.name == "cpu":
                raise OptionError(f"{option} is for the CUDA backend; leave it out, or use --backend cuda.")
            if self.threads is not None:
                raise OptionError(f"--threads is for the CPU backend and {option} for the CUDA one; leave one out.")
        self._check_prefill_chunk()
        self._check_gpus()
        if whole_number("device", self.device_ordinal) != 0 and (self.name == "cpu" or self.threads is not None):
            raise OptionError(f"device {quote(self.device_ordinal)} is a GPU; leave it out, or use the CUDA backend.")

    def _gpu_options(self) -> list[str]:
        """The options for the CUDA backend that are not at their defaults."""
        options = {"--decode": self.decode, "--prefill": self.prefill}
        given = [f"{name} {value}" for name, value in options.items() if value != "auto"]
        if self.gpus != 1:
            given.append(f"--gpus {self.gpus if isinstance(self.gpus, int | str) else len(self.gpus)}")
        return given if self.prefill_chunk is None else [*given, f"--prefill-chunk {quote(self.prefill_chunk)}"]

    def _check_prefill_chunk(self) -> None:
        if self.prefill_chunk is None:
            return
        chunk = self.prefill_chunk
        if self.prefill == "gemv":
            raise OptionError(f"--prefill-chunk {quote(chunk)} is not for --prefill gemv; leave one of them out.")
        if not SMALLEST_CHUNK <= chunk <= LARGEST_CHUNK:
            raise OptionError(
                f"--prefill-chunk is {quote(chunk)}; it must be from {SMALLEST_CHUNK} to {LARGEST_CHUNK}."
            )

    def _set_gpus(self) -> None:
        """Check `gpus`, and convert it to Python's types."""
        gpus: Gpus
        if isinstance(self.gpus, list | tuple) and self.gpus and self.device_ordinal == 0:
            gpus = tuple(whole_number("a GPU of gpus", number) for number in self.gpus)
        elif isinstance(self.gpus, str) and self.gpus == "all":
            gpus = self.gpus
        else:
            try:
                gpus = whole_number("gpus", self.gpus)
            except OptionError:
                gpus = 0
        if isinstance(gpus, int) and gpus < 1:
            raise OptionError(
                f"gpus is {quote(self.gpus)}; it must be a whole number from 1 on, 'all', or, without `device`, a list "
                "of numbers of GPUs."
            )
        if isinstance(gpus, int) and gpus > 1:
            check_ranks(gpus)
        object.__setattr__(self, "gpus", gpus)

    def _check_gpus(self) -> None:
        if self.gpus == 1 or (isinstance(self.gpus, tuple) and len(self.gpus) == 1):
            return
        for option, value in (("--decode", self.decode), ("--prefill", self.prefill)):
            if value not in ("auto", "persistent"):
                raise OptionError(f"{option} {value} is for one GPU; leave it out, or use --gpus 1.")
        if self.prefill_chunk is not None:
            raise OptionError("--prefill-chunk is for one GPU; leave it out, or use --gpus 1.")

    @property
    def gpu_ordinals(self) -> tuple[int, ...]:
        """The numbers of the GPUs that share the model; asks the driver how many there are where that matters.

        Raises:
            BackendError: there is no driver.
        """
        first = self.device_ordinal
        if isinstance(self.gpus, int):
            return tuple(range(first, first + self.gpus))
        if isinstance(self.gpus, str):
            from numba_atomflow.device.driver import gpu_count

            return tuple(range(first, max(gpu_count(), first + 1)))
        return tuple(self.gpus)

    @property
    def gpu_count(self) -> int:
        """How many GPUs share the model, whether or not there are so many."""
        return len(self.gpu_ordinals)

    @property
    def needs_gpu(self) -> bool:
        """Whether only the CUDA backend will do."""
        return self.name == "cuda" or bool(self._gpu_options()) or self.device_ordinal != 0

    @property
    def allows_gpu(self) -> bool:
        """Whether the CUDA backend may be taken."""
        return self.needs_gpu or (self.name == "auto" and self.threads is None)


def _shown(value: object) -> str:
    """A value as it is typed on a command line, for a message."""
    return short(value) if isinstance(value, str) else quote(value)


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
        OptionError: threads are given for the GPU, there are not that many cores, or the GPUs cannot share the model.
    """
    if choice.needs_gpu and choice.threads is not None:
        raise OptionError("--threads is for the CPU backend; leave it out, or use --backend cpu.")
    if choice.allows_gpu:
        from numba_atomflow.device.resources import DeviceResources  # the CPU backend does without

        with DeviceResources() as probe:  # kept open meanwhile, so that the context is not created twice
            ordinals = choice.gpu_ordinals
            if len(ordinals) > 1:
                from numba_atomflow.backends.cuda.tensor_parallel.backend import TensorParallelBackend

                return TensorParallelBackend(geometry, weights, max_seq_len, ordinals=ordinals)
            if choice.needs_gpu or _opened(probe):
                from numba_atomflow.backends.cuda.backend import CudaBackend

                return CudaBackend(
                    geometry,
                    weights,
                    max_seq_len,
                    device_ordinal=ordinals[0],
                    decode=choice.decode,
                    prefill=choice.prefill,
                    prefill_chunk=choice.prefill_chunk,
                )
    from numba_atomflow.backends.cpu import CpuBackend

    return CpuBackend(geometry, dict(weights), max_seq_len, choice.threads, check_weights=check_weights)
