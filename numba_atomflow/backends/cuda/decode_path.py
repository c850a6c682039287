"""How decode steps run: the captured graph of a step's kernels, or one persistent kernel where it can run."""

from numba_atomflow.backends.base import Decode, DecodePath
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.errors import BackendError

_LEAST_CAPABILITY = (9, 0)  # bulk copies and the mbarriers that tell of their arrival


def choose_decode_path(kernels: ModelKernels, wanted: Decode) -> DecodePath:
    """The way that was asked for; "auto" takes the persistent kernel where it can run.

    Raises:
        BackendError: the persistent kernel was asked for, and cannot run.
    """
    if wanted == "graph":
        return DecodePath("graph", "it was asked for")
    obstacle = _obstacle(kernels)
    if obstacle is None:
        return DecodePath("persistent")
    if wanted == "persistent":
        raise BackendError(f"--decode persistent is not possible because {obstacle}; use --decode graph.")
    return DecodePath("graph", obstacle)


def _obstacle(kernels: ModelKernels) -> str | None:
    """Why the persistent kernel cannot run, as a clause; None if it can."""
    capability = kernels.chip.capability
    if capability < _LEAST_CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return f"this GPU's compute capability is {has}, and bulk copies need {needed}"
    if kernels.rotates_apart:
        return "the model's q and k are rotated by a kernel of their own"
    if persistent_shape(kernels) is None:
        return "this version has no persistent kernel"
    return None


def persistent_shape(kernels: ModelKernels) -> object | None:
    """How the persistent kernel is cut for this model and chip; None where it cannot be.

    It cannot be anywhere: there is no such kernel in this version.
    """
    del kernels
    return None
