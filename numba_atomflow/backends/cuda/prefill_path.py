"""How prompts run: up to 8 tokens a step on the GEMV kernels, or in chunks on the GEMM kernels."""

from typing import Literal

from numba_atomflow.backends.base import Prefill, PrefillPath
from numba_atomflow.errors import BackendError
from numba_atomflow.ops.cuda.gemv.projections import MAX_GEMV_WIDTH
from numba_atomflow.ops.cuda.prefill.buckets import DEFAULT_CHUNK
from numba_atomflow.ops.cuda.runtime.chip import Chip

_MIN_CAPABILITY = (8, 0)  # cp.async
_FP8_CAPABILITY = (9, 0)  # wgmma


def choose_prefill_path(
    requested: Prefill,
    chip: Chip,
    max_seq_len: int,
    *,
    beyond_gemm: str | None = None,
    beyond_fp8: str | None = None,
) -> PrefillPath:
    """The requested prefill path; "auto" is "gemm" where it can run. A KV cache of at most `MAX_GEMV_WIDTH` positions
    never has a chunk for its kernels.

    Args:
        beyond_gemm: what the model has that the GEMM path cannot do, as a clause; beyond_fp8: not with FP8 activations.

    Raises:
        BackendError: the requested path cannot run.
    """
    wanted: Literal["gemv", "gemm", "fp8"] = "gemm" if requested == "auto" else requested
    obstacle = None if wanted == "gemv" else _obstacle(wanted, chip) or beyond_gemm
    if wanted == "fp8":
        obstacle = obstacle or beyond_fp8
    if obstacle is not None and requested == "auto":
        return PrefillPath("gemv", obstacle)
    if obstacle is not None:
        raise BackendError(f"--prefill {requested} is not possible because {obstacle}; use --prefill gemv.")
    if wanted != "gemv" and max_seq_len <= MAX_GEMV_WIDTH:
        return PrefillPath("gemv", f"a context of {max_seq_len} tokens fits into one of its steps")
    return PrefillPath(wanted)


def most_chunk_tokens(path: PrefillPath, requested: int | None, max_seq_len: int) -> int:
    """Most tokens of a chunk on the GEMM path; 0 on the GEMV path.

    Args:
        requested: 2,048 if None; the KV cache bounds it.
    """
    return 0 if path.name == "gemv" else min(requested or DEFAULT_CHUNK, max_seq_len)


def _obstacle(requested: Prefill, chip: Chip) -> str | None:
    """Why the path cannot run, as a clause; None if it can."""
    if chip.capability < _MIN_CAPABILITY:
        has, needed = (".".join(map(str, version)) for version in (chip.capability, _MIN_CAPABILITY))
        return f"this GPU's compute capability is {has}, and its kernels need {needed}"
    if requested == "fp8" and chip.capability != _FP8_CAPABILITY:
        return "FP8 activations have kernels for compute capability 9.0 only"
    return None
