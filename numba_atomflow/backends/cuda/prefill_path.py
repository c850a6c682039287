"""How prompts run: up to 8 tokens a step on the GEMV kernels, or in chunks on the GEMM kernels."""

from numba_atomflow.backends.base import Prefill, PrefillPath
from numba_atomflow.errors import BackendError

_NOT_MEASURED = "the GEMM kernels have not been measured yet"


def choose_prefill_path(requested: Prefill) -> PrefillPath:
    """The requested prefill path; "auto" is "gemv" until the GEMM kernels have been measured.

    Raises:
        BackendError: the requested path cannot run.
    """
    if requested == "auto":
        return PrefillPath("gemv", _NOT_MEASURED)
    if requested == "gemv":
        return PrefillPath("gemv")
    raise BackendError(f"--prefill {requested} is not possible because {_NOT_MEASURED}; use --prefill gemv.")
