"""GGUF files of families beyond Llama, as llama.cpp's converter writes them from a model of transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import Weights, add_gguf_field

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import LinearScaling, LongRopeScaling

ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "granite": "granite",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_family_gguf(
    path: Path, model_type: str, geometry: ModelGeometry, weights: Weights, fields: dict[str, Any] | None = None
) -> None:
    """A file of float32 tensors.

    Args:
        weights: of transformers' model. fields: metadata to add or replace; None removes one.
    """
    arch = ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (_metadata(arch, geometry) | (fields or {})).items():
        if value is not None:
            add_gguf_field(writer, key if key.startswith("general.") else f"{arch}.{key}", value)
    for name, values in weights.items():
        stem, _, kind = name.rpartition(".")
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if arch in ("granite", "smollm3") and stem.endswith(("q_proj", "k_proj")):
            heads = values.shape[0] // geometry.head_dim
            pairs = values.reshape(heads, 2, geometry.head_dim // 2, -1)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(f"{_tensor_name(stem, post_norm=geometry.post_norm)}.{kind}", values)
    scaling = geometry.rope_scaling
    if isinstance(scaling, LongRopeScaling):
        for length, factors in (("short", scaling.short_factors), ("long", scaling.long_factors)):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(stem: str, *, post_norm: bool) -> str:
    if stem in _OUTER:
        return _OUTER[stem]
    _, _, layer, part = stem.split(".", 3)
    norms = _GEMMA_NORMS if post_norm else {"post_attention_layernorm": "ffn_norm"}
    return f"blk.{layer}.{(_LAYER | norms)[part]}"


def _metadata(arch: str, geometry: ModelGeometry) -> dict[str, Any]:
    g = geometry
    found: dict[str, Any] = {
        "block_count": g.layers,
        "context_length": g.max_positions,
        "embedding_length": g.hidden,
        "feed_forward_length": g.ffn,
        "attention.head_count": g.heads,
        "attention.head_count_kv": g.kv_heads,
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": g.norm_eps,
        "rope.dimension_count": g.rotary_dim or g.head_dim,
        "rope.freq_base": g.rope_theta,
        "vocab_size": g.vocabulary,
        "attention.sliding_window": g.sliding_window,
    }
    if arch == "gemma2":
        found |= {"attn_logit_softcapping": g.attention_soft_cap, "final_logit_softcapping": g.logit_soft_cap}
    if arch == "granite":
        found |= {"attention.scale": g.attention_scale, "embedding_scale": g.embedding_scale}
        found |= {"residual_scale": g.residual_scale, "logit_scale": 1.0 / g.logit_scale}
    if isinstance(g.rope_scaling, LinearScaling):
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": g.rope_scaling.factor}
    if isinstance(g.rope_scaling, LongRopeScaling):
        found["rope.scaling.original_context_length"] = g.rope_scaling.original_max_positions
        found["rope.scaling.attn_factor"] = g.rope_scaling.attention_factor
    return found
