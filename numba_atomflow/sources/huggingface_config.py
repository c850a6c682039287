"""config.json of a Llama-family model to `ModelGeometry`.

Defaults are those of the model_type's class in transformers. Unsupported settings are rejected by name: ignoring them
would silently give wrong text. The inverse is `model.config_json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sources.base import described_by
from numba_atomflow.sources.fp8_schemes import Fp8Scheme, scheme_of
from numba_atomflow.sources.huggingface_rope import config_rope
from numba_atomflow.sources.json_file import flag, integer, mapping, number


@dataclass(frozen=True)
class Family:
    """Defaults and fixed properties of a model_type.

    Attributes:
        max_positions: default of max_position_embeddings.
        kv_heads: default of num_key_value_heads; None, or null in the config: num_attention_heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        window: default of sliding_window; None: no window.
        optional_window: the window applies only if use_sliding_window is set.
        qkv_bias, qk_norm: see `ModelGeometry`; not configurable.
    """

    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    optional_window: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    "llama": Family(2048),
    "mistral": Family(131072, kv_heads=8, window=4096),
    "qwen2": Family(32768, kv_heads=32, window=4096, optional_window=True, qkv_bias=True),
    "qwen3": Family(32768, kv_heads=32, window=4096, optional_window=True, head_dim=128, qk_norm=True),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def config_geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    """The geometry in the config.json at `path`.

    Raises:
        SourceError: a value is missing or invalid, or a setting is not supported.
        GeometryError: the sizes are inconsistent.
    """
    _refuse_other_models(path, config)
    with described_by(path):
        return _geometry(path, config)


def config_scheme(path: Path, config: Mapping[str, Any]) -> Fp8Scheme | None:
    """The FP8 scheme in config.json; None if the weights are not quantized.

    Raises:
        SourceError: the quantization is not supported.
    """
    quantization = mapping(path, config, "quantization_config")
    return scheme_of(path, quantization) if quantization else None


def _geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    family = FAMILIES[config["model_type"]]
    hidden, heads = integer(path, config, "hidden_size"), integer(path, config, "num_attention_heads")
    if (config.get("head_dim") or family.head_dim) is None and (heads < 1 or hidden % heads):
        raise SourceError(f"{path} has hidden_size {hidden} and {heads} attention heads, which do not fit.")
    max_positions = integer(path, config, "max_position_embeddings", family.max_positions)
    rope = config_rope(path, config, max_positions)
    return ModelGeometry(
        layers=integer(path, config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=integer(
            path, config, "num_key_value_heads", heads if "num_key_value_heads" in config else family.kv_heads or heads
        ),
        head_dim=integer(path, config, "head_dim", family.head_dim or hidden // max(heads, 1)),
        ffn=integer(path, config, "intermediate_size"),
        vocabulary=integer(path, config, "vocab_size"),
        max_positions=min(max_positions, _window(path, config, family) or max_positions),
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        norm_eps=number(path, config, "rms_norm_eps", 1e-6),
        tied_embeddings=flag(path, config, "tie_word_embeddings"),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
    )


def _window(path: Path, config: Mapping[str, Any], family: Family) -> int | None:
    """The sliding window in positions, or None.

    The context is limited to the window, where sliding-window attention equals full attention.
    """
    kinds = config.get("layer_types") or []
    unknown = [kind for kind in kinds if kind not in _LAYER_TYPES] if isinstance(kinds, list) else [kinds]
    if unknown:
        raise SourceError(f"{path} has layers of the type {quote(unknown[0])}, which is not supported.")
    if family.optional_window:
        layers = integer(path, config, "num_hidden_layers")
        some_slide = "sliding_attention" in kinds if kinds else integer(path, config, "max_window_layers", 28) < layers
        if not (flag(path, config, "use_sliding_window") and some_slide):
            return None
    window = config.get("sliding_window", family.window)  # null: none
    return None if window is None else integer(path, {"sliding_window": window}, "sliding_window")


def _refuse_other_models(path: Path, config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise SourceError(f"{path} is of model_type {quote(model_type)}; supported are {', '.join(FAMILIES)}.")
    for key, where in (("attention_bias", "o_proj"), ("mlp_bias", "the MLP")):
        if flag(path, config, key):
            raise SourceError(f"{path} sets {key}; a bias in {where} is not supported.")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise SourceError(f"{path} has hidden_act {quote(activation)}; only 'silu' is supported.")
