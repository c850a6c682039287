"""config.json to `ModelGeometry`.

Defaults are those of the model_type's class in transformers. Unsupported settings are rejected by name: ignoring them
would silently give wrong text. The inverse is `model.config_json`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.sources.base import described_by
from numba_atomflow.sources.fp8_schemes import Fp8Scheme, scheme_of
from numba_atomflow.sources.huggingface_families import FAMILIES, family_fields, text_config
from numba_atomflow.sources.huggingface_rope import config_rope
from numba_atomflow.sources.json_file import flag, integer, mapping, number


def config_geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    """The geometry in the config.json at `path`.

    Raises:
        SourceError: a value is missing or invalid, or a setting is not supported.
        GeometryError: the sizes are inconsistent.
    """
    text = text_config(path, config)
    with described_by(path):
        return _geometry(path, text)


def config_norm_offset(path: Path, config: Mapping[str, Any]) -> float:
    """What is to be added to the weights of the norms of q and k, of the stream, and of the rest.

    Raises:
        SourceError: the model is of another family.
    """
    return FAMILIES[text_config(path, config)["model_type"]].norm_offset


def config_scheme(path: Path, config: Mapping[str, Any]) -> Fp8Scheme | None:
    """The FP8 scheme in config.json; None if the weights are not quantized.

    Raises:
        SourceError: the quantization is not supported.
    """
    quantization = mapping(path, config, "quantization_config")
    return scheme_of(path, quantization) if quantization else None


def _geometry(path: Path, config: Mapping[str, Any]) -> ModelGeometry:
    family = FAMILIES[config["model_type"]]
    hidden, heads = integer(path, config, "hidden_size"), integer(path, config, "num_attention_heads", family.heads)
    if (config.get("head_dim") or family.head_dim) is None and (heads < 1 or hidden % heads):
        raise SourceError(f"{path} has hidden_size {hidden} and {heads} attention heads, which do not fit.")
    head_dim = integer(path, config, "head_dim", family.head_dim or hidden // max(heads, 1))
    rope = config_rope(path, config, head_dim)
    return ModelGeometry(
        layers=integer(path, config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=integer(
            path, config, "num_key_value_heads", heads if "num_key_value_heads" in config else family.kv_heads or heads
        ),
        head_dim=head_dim,
        ffn=integer(path, config, "intermediate_size"),
        vocabulary=integer(path, config, "vocab_size", family.vocabulary),
        max_positions=rope.max_positions,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        rotary_dim=rope.rotary_dim,
        local_rope_theta=rope.local_theta,
        norm_eps=number(path, config, "rms_norm_eps", family.norm_eps),
        tied_embeddings=flag(path, config, "tie_word_embeddings", family.tied),
        **family_fields(path, config, rope.max_positions),
    )
