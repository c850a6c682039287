"""What a model has that not every kernel can do, as clauses for error messages."""

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.rope_tables import tables_of


def beyond_qwen(geometry: ModelGeometry) -> list[str]:
    """What kernels for Llama, Qwen2 and Qwen3 cannot do; sliding windows and RoPE are not among it."""
    g = geometry
    found = {
        "norms after attention and after the MLP": g.post_norm,
        "no norm before attention and the MLP": not g.pre_norm,
        "a norm of all heads of q and of k": g.qk_norm_of_all_heads,
        "GELU in the MLP": g.hidden_act != "silu",
        "a soft cap of attention scores": g.attention_soft_cap is not None,
        "a soft cap of logits": g.logit_soft_cap is not None,
    }
    return [feature for feature, present in found.items() if present]


def beyond_calibration(geometry: ModelGeometry, tokens: int) -> list[str]:
    """What the forward pass of a calibration with sequences of so many tokens cannot do."""
    found = beyond_qwen(geometry)
    if len(tables_of(geometry)) > 1:
        found.append("layers with different RoPE")
    if geometry.sliding_window is not None and geometry.sliding_window < tokens:
        found.append(f"a sliding window of {geometry.sliding_window}")
    return found


def beyond_llama(geometry: ModelGeometry) -> list[str]:
    """What kernels for Llama with one table of RoPE cannot do."""
    g = geometry
    found = {
        "a bias of q, k and v": g.qkv_bias,
        "norms of q and k": g.qk_norm,
        "a sliding window": g.sliding_window is not None,
        "layers with different RoPE": len(tables_of(g)) > 1,
    }
    return [feature for feature, present in found.items() if present] + beyond_qwen(geometry)
