"""A geometry as the ``config.json`` of a Hugging Face model: for transformers, for other engines, for test models.

The inverse is `sources.huggingface_config.config_geometry`.
"""

from typing import Any

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import Llama3Scaling, LongRopeScaling, YarnScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def model_type_of(geometry: ModelGeometry) -> str:
    """The model_type with this computation; a Mistral without a sliding window is a Llama.

    The first of these that has something which no other has; a geometry that has more than one of them has no
    model_type, and `config_json` would lose a part of it.
    """
    g = geometry
    if g.post_norm:
        return "olmo2" if not g.pre_norm else "gemma3_text" if g.qk_norm else "gemma2"
    if g.no_rope_layers:
        return "smollm3"
    if g.rotary_dim is not None or isinstance(g.rope_scaling, LongRopeScaling):
        return "phi3"
    if (g.embedding_scale, g.residual_scale, g.attention_scale, g.logit_scale) != (1.0, 1.0, None, 1.0):
        return "granite"
    if g.qk_norm or g.qkv_bias:
        return "qwen3" if g.qk_norm else "qwen2"
    return "llama" if g.sliding_window is None else "mistral"


def config_json(geometry: ModelGeometry, model_type: str | None = None) -> dict[str, Any]:
    """The contents of config.json as transformers 4 writes them and every later version reads them.

    Args:
        geometry: of the model.
        model_type: one with this computation; `model_type_of` if None.

    Returns:
        A JSON-ready record, with neither BOS nor EOS.
    """
    model_type = model_type or model_type_of(geometry)
    activation = "hidden_activation" if model_type.startswith("gemma") else "hidden_act"
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        activation: _ACTIVATIONS[geometry.hidden_act],
        "num_hidden_layers": geometry.layers,
        "hidden_size": geometry.hidden,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "intermediate_size": geometry.ffn,
        "vocab_size": geometry.vocabulary,
        "max_position_embeddings": geometry.max_positions,
        "rope_theta": geometry.rope_theta,
        "rms_norm_eps": geometry.norm_eps,
        "tie_word_embeddings": geometry.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return config | _window(geometry, model_type) | _family(geometry, model_type) | _rope(geometry)


def _window(geometry: ModelGeometry, model_type: str) -> dict[str, Any]:
    """The sliding window, and the layers that have it."""
    g = geometry
    if model_type == "llama":
        return {}
    if model_type in ("mistral", "phi3"):
        return {"sliding_window": g.sliding_window}
    kinds = ["sliding_attention" if i in g.sliding_layers else "full_attention" for i in range(g.layers)]
    slides = g.sliding_window is not None
    if model_type.startswith("gemma"):
        return {"sliding_window": g.sliding_window or g.max_positions, "layer_types": kinds}
    if model_type in ("qwen2", "qwen3", "smollm3") and slides:
        return {"sliding_window": g.sliding_window, "use_sliding_window": True, "layer_types": kinds}
    return {}


def _family(geometry: ModelGeometry, model_type: str) -> dict[str, Any]:
    """What a family has that Llama has not."""
    g = geometry
    scores = g.head_dim**-0.5 if g.attention_scale is None else g.attention_scale
    if model_type.startswith("gemma"):
        local = {"rope_local_base_freq": g.local_rope_theta} if g.local_rope_theta is not None else {}
        return local | {
            "query_pre_attn_scalar": round(scores**-2),  # transformers takes whole numbers only
            "attn_logit_softcapping": g.attention_soft_cap,
            "final_logit_softcapping": g.logit_soft_cap,
        }
    if model_type == "smollm3":
        return {"no_rope_layers": [int(i not in g.no_rope_layers) for i in range(g.layers)]}
    if model_type == "granite":
        return {
            "embedding_multiplier": g.embedding_scale,
            "residual_multiplier": g.residual_scale,
            "attention_multiplier": scores,
            "logits_scaling": 1.0 / g.logit_scale,
        }
    if g.rotary_dim is not None:
        return {"partial_rotary_factor": g.rotary_dim / g.head_dim}
    return {}


def _rope(geometry: ModelGeometry) -> dict[str, Any]:
    """The scaling of RoPE."""
    scaling = geometry.rope_scaling
    if scaling is None:
        return {}
    record: dict[str, Any] = {"rope_type": scaling.KIND, "factor": scaling.factor}
    match scaling:
        case Llama3Scaling():
            record |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        case YarnScaling():
            record |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            record["attention_factor"] = scaling.attention_factor
        case LongRopeScaling():
            record |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
            record["attention_factor"] = scaling.attention_factor
    original = getattr(scaling, "original_max_positions", None)
    if scaling.KIND == "dynamic":  # there transformers has no other place for it
        return {"rope_scaling": record, "max_position_embeddings": original}
    if original is not None:
        record["original_max_position_embeddings"] = original
    beside = {"original_max_position_embeddings": original} if scaling.KIND == "longrope" else {}
    return {"rope_scaling": record} | beside
