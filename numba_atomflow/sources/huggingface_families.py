"""The families of models in config.json, by model_type: their defaults, and what they have that Llama has not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.sources.json_file import flag, integer, mapping, number, unusable

Sliding = Literal["all", "from max_window_layers", "but every pattern-th", "without RoPE"]


@dataclass(frozen=True)
class Family:
    """Defaults and fixed properties of a model_type.

    Attributes:
        max_positions: default of max_position_embeddings.
        heads, vocabulary: defaults of num_attention_heads and vocab_size, which published configs of Gemma 3 omit;
            None: the config must have them.
        kv_heads: default of num_key_value_heads; None, or null in the config: num_attention_heads.
        head_dim: default of head_dim; None: hidden_size / num_attention_heads.
        window: default of sliding_window; None: no window.
        sliding: the layers in which the window slides, where layer_types does not say so.
        optional_window: the window applies only if use_sliding_window is set.
        pattern: default of sliding_window_pattern, the distance between layers without a window.
        original_positions: default of original_max_position_embeddings; None: max_position_embeddings.
        theta, norm_eps, tied: defaults of rope_theta, rms_norm_eps and tie_word_embeddings.
        partial_rope: partial_rotary_factor has an effect.
        activation: the key and the default of the MLP's function.
        norm_offset: added to the weights of norms.
        scaled_embeddings: the embedding is multiplied by sqrt(hidden_size).
        soft_caps: defaults of attn_logit_softcapping and final_logit_softcapping; None: the family has none.
        query_scale: default of query_pre_attn_scalar, whose inverse root multiplies scores; None: the family has none.
        multipliers: the family has Granite's.
        fixed: fields of `ModelGeometry` that are not configurable.
    """

    max_positions: int
    heads: int | None = None
    vocabulary: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    sliding: Sliding = "all"
    optional_window: bool = False
    pattern: int = 1
    original_positions: int | None = None
    theta: float = 10000.0
    norm_eps: float = 1e-6
    tied: bool = False
    partial_rope: bool = False
    activation: tuple[str, str] = ("hidden_act", "silu")
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    soft_caps: tuple[float | None, float | None] | None = None
    query_scale: float | None = None
    multipliers: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _gemma(
    max_positions: int,
    vocabulary: int,
    pattern: int,
    theta: float,
    caps: tuple[float | None, float | None],
    **fixed: bool,
) -> Family:
    return Family(
        max_positions,
        heads=8,
        vocabulary=vocabulary,
        kv_heads=4,
        head_dim=256,
        window=4096,
        sliding="but every pattern-th",
        pattern=pattern,
        theta=theta,
        tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        norm_offset=1.0,
        scaled_embeddings=True,
        soft_caps=caps,
        query_scale=256.0,
        fixed={"post_norm": True} | fixed,
    )


FAMILIES = {
    "llama": Family(2048),
    "mistral": Family(131072, kv_heads=8, window=4096),
    "qwen2": Family(
        32768,
        kv_heads=32,
        window=4096,
        sliding="from max_window_layers",
        optional_window=True,
        fixed={"qkv_bias": True},
    ),
    "qwen3": Family(
        32768,
        kv_heads=32,
        window=4096,
        sliding="from max_window_layers",
        optional_window=True,
        head_dim=128,
        fixed={"qk_norm": True},
    ),
    "gemma2": _gemma(8192, 256000, 2, 1e4, (50.0, 30.0)),
    "gemma3_text": _gemma(131072, 262208, 6, 1e6, (None, None), qk_norm=True),
    "phi3": Family(4096, norm_eps=1e-5, partial_rope=True, original_positions=4096),
    "smollm3": Family(32768, kv_heads=4, sliding="without RoPE", optional_window=True, theta=2e6, tied=True),
    "granite": Family(2048, multipliers=True),
    "olmo2": Family(
        2048,
        norm_eps=1e-5,
        fixed={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_of_all_heads": True},
    ),
}
# model_types whose language model is described in text_config; the rest of the model reads images
IMAGE_MODELS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
_MIXTURES = {
    "llama4": "Llama 4",
    "llama4_text": "Llama 4",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2 MoE",
    "qwen3_moe": "Qwen3 MoE",
    "phimoe": "Phi-3.5 MoE",
    "granitemoe": "Granite MoE",
    "granitemoeshared": "Granite MoE",
    "olmoe": "OLMoE",
    "gpt_oss": "gpt-oss",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_MOST_LAYERS = 10_000
_LAYER_TYPES = ("full_attention", "sliding_attention")


def text_config(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the language model, which must be of a known family.

    Raises:
        SourceError: the model is of another family.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in IMAGE_MODELS:
        text = mapping(path, config, "text_config")
        tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config and key not in text}
        config = {"model_type": IMAGE_MODELS[model_type]} | tied | dict(text)
        model_type = config["model_type"]
    if isinstance(model_type, str) and model_type in _MIXTURES:
        raise SourceError(
            f"{path} is of model_type {quote(model_type)}: {_MIXTURES[model_type]} is a mixture of experts, which is "
            "not supported; take a dense model."
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        names = ", ".join((*FAMILIES, *IMAGE_MODELS))
        raise SourceError(f"{path} is of model_type {quote(model_type)}; supported are {names}.")
    for key, where in (("attention_bias", "o_proj"), ("mlp_bias", "the MLP")):
        if flag(path, config, key):
            raise SourceError(f"{path} sets {key}; a bias in {where} is not supported.")
    if flag(path, config, "use_bidirectional_attention"):
        raise SourceError(f"{path} sets use_bidirectional_attention, which is for embeddings and not supported.")
    return config


def family_fields(path: Path, config: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The fields of `ModelGeometry` that Llama does not have, but for those of RoPE.

    Raises:
        SourceError: a value is invalid or not supported.
    """
    family = FAMILIES[config["model_type"]]
    fields = dict(family.fixed) | {"hidden_act": _activation(path, config, family)}
    window = _window(path, config, family)
    if window is not None and window.positions < max_positions and window.layers:
        fields |= {"sliding_window": window.positions, "sliding_layers": window.layers}
    if family.sliding == "without RoPE":
        fields["no_rope_layers"] = _no_rope_layers(path, config)
    if family.scaled_embeddings:
        fields["embedding_scale"] = integer(path, config, "hidden_size") ** 0.5
    if family.query_scale is not None:
        fields["attention_scale"] = number(path, config, "query_pre_attn_scalar", family.query_scale) ** -0.5
    if family.soft_caps is not None:
        keys = (("attention_soft_cap", "attn_logit_softcapping"), ("logit_soft_cap", "final_logit_softcapping"))
        for (name, key), default in zip(keys, family.soft_caps, strict=True):
            cap = config.get(key, default)  # null: none
            fields[name] = None if cap is None else number(path, {key: cap}, key)
    if family.multipliers:
        fields |= {
            "embedding_scale": number(path, config, "embedding_multiplier", 1.0),
            "residual_scale": number(path, config, "residual_multiplier", 1.0),
            "attention_scale": number(path, config, "attention_multiplier", 1.0),
            "logit_scale": 1.0 / number(path, config, "logits_scaling", 1.0),
        }
    return fields


class _Window(NamedTuple):
    positions: int
    layers: tuple[int, ...]


def _window(path: Path, config: Mapping[str, Any], family: Family) -> _Window | None:
    """The sliding window and its layers, or None."""
    kinds = _layer_types(path, config)
    if family.optional_window and not flag(path, config, "use_sliding_window"):
        return None
    window = config.get("sliding_window", family.window)  # null: none
    if window is None:
        return None
    layers = _layers(path, config)
    if family.sliding == "all":  # transformers reads no layer_types there
        sliding = list(layers)
    elif kinds:
        if len(kinds) < len(layers):
            raise SourceError(f"{path} has {len(kinds)} layer_types for {len(layers)} layers; get the file again.")
        sliding = [i for i in layers if kinds[i] == "sliding_attention"]
    elif family.sliding == "from max_window_layers":
        sliding = [i for i in layers if i >= integer(path, config, "max_window_layers", 28)]
    elif family.sliding == "without RoPE":
        sliding = list(_no_rope_layers(path, config))
    else:
        pattern = integer(path, config, "sliding_window_pattern", family.pattern)
        if pattern < 1:
            raise unusable(path, "sliding_window_pattern", pattern)
        sliding = [i for i in layers if (i + 1) % pattern]
    return _Window(integer(path, {"sliding_window": window}, "sliding_window"), tuple(sliding))


def _layers(path: Path, config: Mapping[str, Any]) -> range:
    """The layers, of which lists are made: not too many for that."""
    layers = integer(path, config, "num_hidden_layers")
    if not 1 <= layers <= _MOST_LAYERS:
        raise unusable(path, "num_hidden_layers", layers)
    return range(layers)


def _layer_types(path: Path, config: Mapping[str, Any]) -> list[str]:
    kinds = config.get("layer_types") or []
    unknown = [kind for kind in kinds if kind not in _LAYER_TYPES] if isinstance(kinds, list) else [kinds]
    if unknown:
        raise SourceError(f"{path} has layers of the type {quote(unknown[0])}, which is not supported.")
    return list(kinds)


def _no_rope_layers(path: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without RoPE, from a list with a 0 for each (SmolLM3)."""
    layers = _layers(path, config)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        interval = integer(path, config, "no_rope_layer_interval", 4)
        if interval < 1:
            raise unusable(path, "no_rope_layer_interval", interval)
        return tuple(i for i in layers if (i + 1) % interval == 0)
    if not isinstance(rotated, list) or len(rotated) < len(layers) or not all(x in (0, 1) for x in rotated):
        raise unusable(path, "no_rope_layers", rotated)
    return tuple(i for i in layers if not rotated[i])


def _activation(path: Path, config: Mapping[str, Any], family: Family) -> str:
    key, default = family.activation
    found = config.get(key) or config.get("hidden_act") or default
    if not isinstance(found, str) or found not in _ACTIVATIONS:
        names = " and ".join(map(repr, _ACTIVATIONS))
        raise SourceError(f"{path} has {short(key)} {quote(found)}; supported are {names}.")
    return _ACTIVATIONS[found]
