"""Metadata of a GGUF file that change the computation: accepted with a neutral value, otherwise rejected by name.

Ignoring them would silently give wrong text. Sources: `Keys` of the gguf package; llama.cpp for the defaults.
"""

from collections.abc import Collection, Mapping
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.sources.gguf_fields import GgufFields

# Values without effect; other values are rejected. The keys of RoPE are below.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
# Read by `sources.gguf`.
_ROPE_READ = ("dimension_count", "freq_base")
# Without effect if the scaling factor is 1: exponents of the factor, and records of the training.
_ROPE_OF_THE_FACTOR = (
    "scaling.finetuned",
    "scaling.original_context_length",
    "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
    "scaling.yarn_ext_factor",
    "scaling.yarn_log_multiplier",
)
_ROPE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "dimension_sections": ([0, 0, 0, 0], [0, 0, 0]),
    "scaling.alpha": (0.0, 1.0),
    "scaling.attn_factor": (1.0,),
    "scaling.yarn_attn_factor": (1.0,),
}
_ROPE_TYPES = ("none", "linear", "yarn")  # types without effect if the factor is 1


def refuse_unsupported(fields: GgufFields, arch: str, head_dim: int, read: Collection[str] = ()) -> None:
    """Reject metadata that specify another computation than `ModelGeometry`.

    Args:
        fields: all metadata.
        arch: general.architecture, the prefix of the keys.
        head_dim: width of a head.
        read: keys without the architecture that another function reads.

    Raises:
        SourceError: names the key and its value.
    """
    if fields.values.get(f"{arch}.expert_count"):
        raise SourceError(f"{fields.label} is a mixture of experts, which is not supported; take a dense model.")
    for key, neutral in _NEUTRAL.items():
        if key not in read:
            _check_neutral(fields, f"{arch}.{key}", neutral)
    scale = fields.value(f"{arch}.attention.scale", float, 0.0)
    if scale and "attention.scale" not in read and abs(scale * head_dim**0.5 - 1) > 1e-5:
        raise _not_supported(fields, f"{arch}.attention.scale")
    _check_rope(fields, arch, head_dim, read)


def _check_rope(fields: GgufFields, arch: str, head_dim: int, read: Collection[str]) -> None:
    prefix = f"{arch}.rope."
    if "rope.scaling.type" not in read:
        _check_scaling(fields, prefix)
    for key in fields.values:
        name = key.removeprefix(prefix)
        if not key.startswith(f"{arch}.rope") or name in (*_ROPE_READ, *_ROPE_OF_THE_FACTOR):
            continue
        if name in ("scale_linear", "scaling.factor", "scaling.type") or f"rope.{name}" in read:
            continue
        if name == "dimension_count_swa":
            _check_neutral(fields, key, (head_dim,))
        elif name == "freq_base_swa":
            _check_neutral(fields, key, (fields.values.get(f"{prefix}freq_base", 10000.0),))
        elif name in _ROPE_NEUTRAL:
            _check_neutral(fields, key, _ROPE_NEUTRAL[name])
        else:
            raise _not_supported(fields, key)


def _check_scaling(fields: GgufFields, prefix: str) -> None:
    """Check that the scaling factor is 1, or not used by its type.

    As in llama.cpp, the default type is linear, the factor has an older key, and a factor of 0 means 1.
    """
    kind = fields.value(f"{prefix}scaling.type", str, "linear")
    if kind not in _ROPE_TYPES:
        raise _not_supported(fields, f"{prefix}scaling.type")
    name = "scaling.factor" if f"{prefix}scaling.factor" in fields else "scale_linear"
    if fields.value(f"{prefix}{name}", float, 1.0) not in (0.0, 1.0) and kind != "none":
        raise _not_supported(fields, f"{prefix}{name}")


def _check_neutral(fields: GgufFields, key: str, neutral: tuple[Any, ...]) -> None:
    value = fields.values.get(key)
    if value is not None and value not in neutral:
        raise _not_supported(fields, key)


def _not_supported(fields: GgufFields, key: str) -> SourceError:
    return SourceError(
        f"{fields.label} has {short(key)} {quote(fields.values[key])}, which changes what the model computes in a way "
        "that is not supported; take another model."
    )
