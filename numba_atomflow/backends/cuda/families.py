"""Which models the CUDA backend can run."""

from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.features import beyond_qwen

HEAD_DIMS = (64, 80, 96, 128)


def check_family(geometry: ModelGeometry, max_seq_len: int) -> None:
    """Check that there are kernels for a model.

    Within a sliding window, attention sees all positions, as the kernels do.

    Raises:
        BackendError: the model has something that no kernel can do, or the KV cache is longer than a sliding window.
    """
    missing = beyond_qwen(geometry)
    if geometry.head_dim not in HEAD_DIMS:
        missing.append(f"heads of {geometry.head_dim}")
    if missing:
        raise BackendError(
            f"The CUDA backend has no kernels for {missing[0]}, which this model has; use --backend cpu."
        )
    if geometry.sliding_layers and geometry.sliding_window is not None and max_seq_len > geometry.sliding_window:
        raise BackendError(
            f"The CUDA backend has no kernels for a sliding window, and this model's has {geometry.sliding_window:,} "
            f"positions; use --max-seq-len {geometry.sliding_window} or less, or --backend cpu."
        )
