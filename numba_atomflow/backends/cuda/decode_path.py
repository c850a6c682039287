"""How decode steps run: the captured graph of a step's kernels, or one persistent kernel where it can run."""

from numba_atomflow.backends.base import Decode, DecodePath, Verification
from numba_atomflow.backends.cuda.families import beyond_fast_paths
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.formats import HeadFormat
from numba_atomflow.model.rope_tables import tables_of
from numba_atomflow.ops.cuda.runtime.chip import Chip

_MIN_CAPABILITY = (9, 0)  # TMA bulk copies, and mbarriers that count their bytes


def kernels_for(
    geometry: ModelGeometry,
    chip: Chip,
    head: HeadFormat,
    requested: Decode,
    *,
    dependent: bool | None = None,
    chunk: int = 0,
    fp8_activations: bool = False,
    window: int | None = None,
) -> tuple[ModelKernels, DecodePath]:
    """A model's kernels, and how decode steps run.

    Args:
        chunk: most tokens of a prefill step on the GEMM path; 0: prompts run on the GEMV kernels.
        fp8_activations: of the GEMM path.
        window: positions of the sliding window; None if it is not shorter than the KV cache.

    Raises:
        BackendError: as `ModelKernels` and `choose_decode_path`.
    """
    path = choose_decode_path(ModelKernels(geometry, chip, head, dependent=dependent, window=window), requested)
    persistent = path.name == "persistent"
    kernels = ModelKernels(
        geometry,
        chip,
        head,
        dependent=dependent,
        persistent=persistent,
        chunk=chunk,
        fp8_activations=fp8_activations,
        window=window,
    )
    return kernels, path


def choose_decode_path(kernels: ModelKernels, requested: Decode) -> DecodePath:
    """The requested decode path; "auto" is the persistent kernel where it can run.

    Raises:
        BackendError: the persistent kernel is requested, and cannot run.
    """
    if requested == "graph":
        return DecodePath("graph", "it was requested")
    obstacle = model_obstacle(kernels.geometry, kernels.chip, kernels.window) or kernels.persistent_shape.refusal()
    if obstacle is None:
        return DecodePath("persistent")
    if requested == "persistent":
        raise BackendError(f"--decode persistent is not possible because {obstacle}; use --decode graph.")
    return DecodePath("graph", obstacle)


def model_obstacle(geometry: ModelGeometry, chip: Chip, window: int | None) -> str | None:
    """Why the persistent kernel cannot run a model, however it is cut, as a clause; None if it can.

    Args:
        window: of `families.sliding_window`.
    """
    capability = chip.capability
    if capability < _MIN_CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, _MIN_CAPABILITY))
        return f"this GPU's compute capability is {has}, and bulk copies need {needed}"
    beyond = beyond_fast_paths(geometry, window)
    if beyond is not None:
        return beyond
    if len(tables_of(geometry)) > 1:
        return "the model's layers have different RoPE"
    return None


def verification_of(kernels: ModelKernels) -> Verification:
    """What a model's kernels can verify. It is not automatic: on an H200 a step of 8 tokens of a 3B model takes 1.9
    times as long as one of one token, and proposals that are wrong cost that.
    """
    if not kernels.persistent:
        return Verification(1, "decode steps run as a graph, whose kernels for several tokens round otherwise")
    if not kernels.wide_shapes:
        return Verification(1, "shared memory has no room for the inputs of two tokens")
    return Verification(max(kernels.wide_shapes), automatic=False)
