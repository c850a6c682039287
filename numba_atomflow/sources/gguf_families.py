"""What families beyond Llama, Qwen2 and Qwen3 are in a GGUF file: fields of `ModelGeometry`, from llama.cpp's keys.

What a file does not say is what llama.cpp has in its code: defaults, which layers have a sliding window or no RoPE, and
that models of Gemma with so many layers as the 27B scale scores by hidden size and heads. Its converter adds 1 to the
weights of Gemma's norms, and permutes rows of q and k in the models whose RoPE is interleaved. Sources:
`llama_model::load_hparams` and `convert_hf_to_gguf.py` of llama.cpp.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.rope_scaling import LinearScaling, LongRopeScaling
from numba_atomflow.sources.gguf_fields import GgufFields

LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_NO_ROPE_INTERVAL = 4  # of SmolLM3
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class GgufFamily:
    """What is special about an architecture.

    Attributes:
        interleaved_rope: rows of q and k are permuted.
        keys: of the metadata that have an effect, without the architecture; in others they are refused unless neutral.
        fixed: fields of `ModelGeometry` that the architecture implies.
        window: default of the sliding window; 0: none.
        pattern: distance between the layers without a window; 0: all layers have one.
        scaled_embeddings: the embedding is multiplied by sqrt(hidden).
        layers_27b: layers of the model of Gemma that scales scores by hidden size and heads.
        soft_caps: defaults of the caps of scores and of logits; 0: none.
        no_rope_layers: layers without RoPE, as SmolLM3 has them.
        partial_rope: `rope.dimension_count` may be less than a head, and RoPE has LongRoPE's factors.
    """

    interleaved_rope: bool = False
    keys: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    window: int | None = None
    pattern: int = 0
    scaled_embeddings: bool = False
    layers_27b: int = 0
    soft_caps: tuple[float, float] = (0.0, 0.0)
    no_rope_layers: bool = False
    partial_rope: bool = False


_SCALE, _CAPS = "attention.scale", ("attn_logit_softcapping", "final_logit_softcapping")
_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.freq_base_swa")
_GEMMA: dict[str, Any] = {"hidden_act": "gelu_tanh", "post_norm": True}
FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(interleaved_rope=True),
    "qwen2": GgufFamily(fixed={"qkv_bias": True}),
    "qwen3": GgufFamily(fixed={"qk_norm": True}),
    "gemma2": GgufFamily(
        keys=(_SCALE, *_CAPS),
        fixed=_GEMMA,
        window=4096,
        pattern=2,
        scaled_embeddings=True,
        layers_27b=46,
        soft_caps=(50.0, 30.0),
    ),
    "gemma3": GgufFamily(
        keys=(_SCALE, _CAPS[1], *_SCALING),
        fixed=_GEMMA | {"qk_norm": True},
        window=0,
        pattern=6,
        scaled_embeddings=True,
        layers_27b=62,
    ),
    "phi3": GgufFamily(keys=("rope.scaling.attn_factor",), window=0, partial_rope=True),
    "granite": GgufFamily(interleaved_rope=True, keys=(_SCALE, "embedding_scale", "residual_scale", "logit_scale")),
    "olmo2": GgufFamily(
        fixed={"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_of_all_heads": True},
    ),
    "smollm3": GgufFamily(interleaved_rope=True, no_rope_layers=True),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that the fields below depend on."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    max_positions: int


def family_fields(fields: GgufFields, arch: str, sizes: Sizes) -> dict[str, Any]:
    """The fields of `ModelGeometry` that Llama does not have, but for LongRoPE's.

    Raises:
        SourceError: names the key of an unusable value.
    """
    family = FAMILIES[arch]
    has_lists = family.window is not None or family.no_rope_layers
    if has_lists and not 0 < sizes.layers <= _MOST_LAYERS:
        raise fields.unusable(f"{arch}.block_count")
    if min(sizes.hidden, sizes.head_dim) < 1:
        raise fields.unusable(f"{arch}.embedding_length")
    found = dict(family.fixed)
    if family.window is not None:
        found |= _window(fields, arch, family, sizes)
    if family.scaled_embeddings:
        found["embedding_scale"] = sizes.hidden**0.5
    if family.no_rope_layers:
        found["no_rope_layers"] = tuple(i for i in range(sizes.layers) if (i + 1) % _NO_ROPE_INTERVAL == 0)
    if arch == "granite":
        names = ("embedding_scale", "residual_scale")
        found |= {name: _number(fields, f"{arch}.{name}") or 1.0 for name in names}
        found["logit_scale"] = 1.0 / (_number(fields, f"{arch}.logit_scale") or 1.0)
    if _SCALE in family.keys:
        found["attention_scale"] = _number(fields, f"{arch}.{_SCALE}") or _score_scale(family, sizes)
    for name, key, default in zip(("attention_soft_cap", "logit_soft_cap"), _CAPS, family.soft_caps, strict=True):
        if key in family.keys:
            found[name] = _number(fields, f"{arch}.{key}", default) or None
    if arch == "gemma3":
        found["local_rope_theta"] = fields.number(f"{arch}.rope.freq_base_swa", 10000.0)
        found["rope_scaling"] = _linear_scaling(fields, arch)
    return found


def _number(fields: GgufFields, key: str, default: float = 0.0) -> float:
    """A positive number, or 0, which stands for none; `default` if absent."""
    value = fields.value(key, float, default)
    return fields.number(key) if value and key in fields else value


def _score_scale(family: GgufFamily, sizes: Sizes) -> float | None:
    """The factor of scores where the file has none."""
    if not family.layers_27b:
        return None
    width = sizes.hidden / sizes.heads if sizes.layers == family.layers_27b else sizes.head_dim
    return float(width**-0.5)


def _window(fields: GgufFields, arch: str, family: GgufFamily, sizes: Sizes) -> dict[str, Any]:
    """The sliding window and its layers, if it is shorter than the context."""
    window = fields.integer(f"{arch}.attention.sliding_window", family.window)
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = fields.values.get(key, family.pattern)
    if isinstance(pattern, list):  # a flag for each layer
        if len(pattern) < sizes.layers or not all(type(flag) is bool for flag in pattern):
            raise fields.unusable(key)
        sliding = tuple(i for i in range(sizes.layers) if pattern[i])
    elif type(pattern) is not int or pattern < 0:
        raise fields.unusable(key)
    else:
        sliding = tuple(i for i in range(sizes.layers) if pattern == 0 or (i + 1) % pattern)
    if window < 0 or window > 0xFFFFFFFF:
        raise fields.unusable(f"{arch}.attention.sliding_window")
    if not 0 < window < sizes.max_positions or not sliding:
        return {}
    return {"sliding_window": window, "sliding_layers": sliding}


def _linear_scaling(fields: GgufFields, arch: str) -> LinearScaling | None:
    kind = fields.value(f"{arch}.rope.scaling.type", str, "linear")
    name = "scaling.factor" if f"{arch}.rope.scaling.factor" in fields else "scale_linear"  # the older key
    factor = _number(fields, f"{arch}.rope.{name}", 1.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind != "linear":
        raise SourceError(f"{fields.label} has RoPE scaling of the type {quote(kind)}, which is not supported there.")
    return LinearScaling(factor)


def longrope_scaling(
    fields: GgufFields, arch: str, max_positions: int, short: tuple[float, ...], long: tuple[float, ...]
) -> LongRopeScaling:
    """LongRoPE with these divisors. Its attention factor is a float32 in the file: where it is the default, that is
    taken in full.
    """
    original = fields.integer(f"{arch}.rope.scaling.original_context_length")
    if original < 2 or max_positions < 1:
        raise fields.unusable(f"{arch}.rope.scaling.original_context_length")
    factor = max_positions / original
    default = LongRopeScaling.default_attention_factor(factor, original)
    attention_factor = fields.number(f"{arch}.rope.scaling.attn_factor", default)
    if math.isclose(attention_factor, default, rel_tol=1e-6):
        attention_factor = default
    return LongRopeScaling(factor, original, attention_factor, short, long)
