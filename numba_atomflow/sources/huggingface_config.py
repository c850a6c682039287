"""config.json of a Llama-family model to `ModelGeometry`.

Defaults are those of `transformers.LlamaConfig`. What a config asks for and the engine does not do is refused by name:
ignoring it would give wrong text without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.geometry import ModelGeometry, RopeScaling
from numba_atomflow.sources.base import described_by
from numba_atomflow.sources.json_file import integer, number

MODEL_TYPES = ("llama", "mistral")  # Mistral 7B is a Llama; its sliding window becomes a shorter context


def config_geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    """The geometry that config.json at `path` describes.

    Raises:
        SourceError: a value is missing or unusable, or the model needs something that is not supported.
        GeometryError: the numbers contradict each other.
    """
    _refuse_other_models(path, config)
    with described_by(path):
        return _geometry(path, config)


def _geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    hidden, heads = integer(path, config, "hidden_size"), integer(path, config, "num_attention_heads")
    if config.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise SourceError(f"{path} has hidden_size {hidden} and {heads} attention heads, which do not fit.")
    # transformers 5 keeps everything about RoPE in rope_parameters, earlier versions in rope_theta and rope_scaling.
    rope = _mapping(path, config, "rope_parameters") or _mapping(path, config, "rope_scaling")
    max_positions = integer(path, config, "max_position_embeddings", 2048)
    return ModelGeometry(
        layers=integer(path, config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=integer(path, config, "num_key_value_heads", heads),
        head_dim=integer(path, config, "head_dim", hidden // max(heads, 1)),
        ffn=integer(path, config, "intermediate_size"),
        vocabulary=integer(path, config, "vocab_size"),
        max_positions=min(max_positions, integer(path, config, "sliding_window", max_positions)),
        rope_theta=number(path, rope if "rope_theta" in rope else config, "rope_theta", 10000.0),
        rope_scaling=_rope_scaling(path, rope),
        norm_eps=number(path, config, "rms_norm_eps", 1e-6),
        tied_embeddings=_flag(path, config, "tie_word_embeddings"),
    )


def _refuse_other_models(path: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise SourceError(f"{path} is of model_type {model_type!r}; supported are {', '.join(MODEL_TYPES)}.")
    quantisation = _mapping(path, config, "quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown")
        raise SourceError(f"{path} is quantised by {method!r}, which cannot be read; give the unquantised model.")
    for key in ("attention_bias", "mlp_bias"):
        if _flag(path, config, key):
            raise SourceError(f"{path} sets {key}, which is not supported.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise SourceError(f"{path} has hidden_act {activation!r}; only 'silu' is supported.")
    if number(path, config, "partial_rotary_factor", 1.0) != 1.0:
        raise SourceError(f"{path} rotates only a part of each head (partial_rotary_factor), which is not supported.")


def _rope_scaling(path: Path, rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise SourceError(f"{path} uses RoPE scaling of type {kind!r}; supported are 'default' and 'llama3'.")
    return RopeScaling(
        factor=number(path, rope, "factor"),
        low_freq_factor=number(path, rope, "low_freq_factor"),
        high_freq_factor=number(path, rope, "high_freq_factor"),
        original_max_positions=integer(path, rope, "original_max_position_embeddings"),
    )


def _mapping(path: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise SourceError(f"{path} has an unusable value for {key}: {str(value)[:60]!r}.")
    return value


def _flag(path: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise SourceError(f"{path} has an unusable value for {key}: {str(value)[:60]!r}.")
    return value
