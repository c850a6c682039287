"""What a model has that not all kernels can do: the GEMV kernels can do everything, others less."""

from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.features import beyond_qwen

_HEAD_DIMS = (64, 80, 96, 128)  # of the persistent kernel, and of attention with FP8 activations
# Of a vocabulary: their mass (ops/cuda/token/sample.py) is below 2^63, if all are as likely.
MOST_TOKENS = (1 << 19) - 1


def check_vocabulary(vocabulary: int) -> None:
    """Check that the sampling kernel can add up the mass of all tokens.

    Raises:
        BackendError: it cannot.
    """
    if vocabulary > MOST_TOKENS:
        raise BackendError(
            f"The model's vocabulary has {vocabulary:,} tokens, and sampling on a GPU takes at most {MOST_TOKENS:,}; "
            "use --backend cpu."
        )


def sliding_window(geometry: ModelGeometry, max_seq_len: int) -> int | None:
    """Positions of the sliding window; None if no layer has one that is shorter than the KV cache."""
    window = geometry.sliding_window
    return window if geometry.sliding_layers and window is not None and window < max_seq_len else None


def check_no_window(geometry: ModelGeometry, max_seq_len: int) -> None:
    """Check that no sliding window is shorter than the KV cache that several GPUs share.

    Raises:
        BackendError: one is.
    """
    window = sliding_window(geometry, max_seq_len)
    if window is not None:
        raise BackendError(
            f"Several GPUs share a model in the persistent kernel alone, which cannot do a sliding window, and this "
            f"model's has {window:,} positions; use --max-seq-len {window} or less, or --gpus 1."
        )


def beyond_fast_paths(geometry: ModelGeometry, window: int | None) -> str | None:
    """What neither the persistent kernel nor FP8 activations can do, as a clause; None if it is nothing.

    Args:
        window: of `sliding_window`.
    """
    missing = beyond_qwen(geometry)
    if geometry.head_dim not in _HEAD_DIMS:
        missing.append(f"heads of {geometry.head_dim}")
    if window is not None:
        missing.append(f"a sliding window of {window:,} positions, which is shorter than the context")
    return f"the model has {missing[0]}" if missing else None


def beyond_gemm(geometry: ModelGeometry) -> str | None:
    """What the GEMM path cannot do, as a clause; None if it is nothing."""
    if geometry.hidden_act != "silu" and geometry.ffn % 8:
        return f"the model has GELU of {geometry.ffn} units, which is not a multiple of 8"
    return None
