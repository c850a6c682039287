"""A geometry as the ``config.json`` of a Hugging Face model: for transformers, for other engines, for test models.

The inverse is `sources.huggingface_config.config_geometry`.
"""

from typing import Any

from numba_atomflow.geometry import ModelGeometry

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def model_type_of(geometry: ModelGeometry) -> str:
    """The model_type with this computation: norms of q and k are Qwen3, a QKV bias is Qwen2; Mistral is a Llama."""
    return "qwen3" if geometry.qk_norm else "qwen2" if geometry.qkv_bias else "llama"


def config_json(geometry: ModelGeometry, model_type: str | None = None) -> dict[str, Any]:
    """The contents of config.json as transformers 4 writes them and every later version reads them.

    Args:
        geometry: of the model.
        model_type: "llama", "mistral", "qwen2" or "qwen3"; that of the geometry if None.

    Returns:
        A JSON-ready record, with neither BOS nor EOS.
    """
    model_type = model_type or model_type_of(geometry)
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
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
    }
    scaling = geometry.rope_scaling
    if scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return config
