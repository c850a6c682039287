"""Tiny geometries of the families that differ from Llama in more than an extra vector, by model_type."""

from typing import Any

from tiny_models import Weights, random_weights, tiny_geometry

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.config_json import model_type_of
from numba_atomflow.rope_scaling import LinearScaling, LongRopeScaling
from numba_atomflow.validate.state_dict import as_in_transformers

WINDOW = 16
_GEMMA: dict[str, Any] = {
    "layers": 3,
    "head_dim": 32,
    "tied_embeddings": True,
    "norm_eps": 1e-6,
    "hidden_act": "gelu_tanh",
    "post_norm": True,
    "sliding_window": WINDOW,
    "embedding_scale": 192**0.5,
    "attention_scale": 24**-0.5,
}
FIELDS: dict[str, dict[str, Any]] = {
    "gemma3_text": _GEMMA
    | {
        "sliding_layers": (0, 1),
        "local_rope_theta": 1e4,
        "rope_theta": 1e6,
        "rope_scaling": LinearScaling(8.0),
        "qk_norm": True,
    },
    "gemma2": _GEMMA | {"sliding_layers": (0, 2), "attention_soft_cap": 5.0, "logit_soft_cap": 3.0},
    "phi3": {
        "head_dim": 64,
        "hidden": 256,
        "rotary_dim": 48,
        "tied_embeddings": True,
        "sliding_window": WINDOW,
        "sliding_layers": (0, 1),
        "rope_scaling": LongRopeScaling(
            8.0,
            64,
            LongRopeScaling.default_attention_factor(8.0, 64),
            tuple(1.0 + 0.1 * i for i in range(24)),
            tuple(1.5 + 0.5 * i for i in range(24)),
        ),
    },
    "smollm3": {"layers": 4, "tied_embeddings": True, "no_rope_layers": (3,), "rope_theta": 5e6, "norm_eps": 1e-6},
    "granite": {
        "head_dim": 48,
        "tied_embeddings": True,
        "norm_eps": 1e-6,
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "attention_scale": 0.0625,
        "logit_scale": 1 / 8,
    },
    "olmo2": {
        "head_dim": 48,
        "pre_norm": False,
        "post_norm": True,
        "qk_norm": True,
        "qk_norm_of_all_heads": True,
        "rope_theta": 5e5,
        "norm_eps": 1e-6,
    },
    "mistral": {"hidden": 160, "head_dim": 128, "sliding_window": WINDOW, "sliding_layers": (0, 1)},
}


def family_geometry(family: str, **changes: Any) -> ModelGeometry:
    """The geometry of a model_type."""
    geometry = tiny_geometry(**(FIELDS[family] | changes))
    assert model_type_of(geometry) == family
    return geometry


def family_weights(geometry: ModelGeometry, seed: int = 0) -> Weights:
    """Random weights under the names of transformers."""
    weights = as_in_transformers(geometry, dict(random_weights(geometry, seed)))
    if geometry.tied_embeddings:
        del weights["lm_head.weight"]
    return weights
