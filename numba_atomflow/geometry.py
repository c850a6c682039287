"""The shape of a Llama-family model: one frozen record, read from any description of it.

Kernels, plans and sources depend on nothing else of a model. `parameters` lists every tensor that the model has, under
its Hugging Face name; rotary frequencies are computed in `rope_inverse_frequencies` only.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import GeometryError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.ops.formats import FP8_E4M3

GROUP = FP8_E4M3.group  # weights along K that share one scale
HEAD_DIMS = (64, 80, 96, 128)
LARGEST_COUNT = 2**63 - 1  # kernels compute in int64
_TENSORS_OF_A_LAYER = 9  # at least: two norms and seven projections


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent RoPE scaling (``rope_type: llama3``).

    Raises:
        GeometryError: a field is of a wrong type or out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            _check_number(f"rope_scaling.{field}", getattr(self, field))
        _check_count("rope_scaling.original_max_positions", self.original_max_positions)
        if self.high_freq_factor <= self.low_freq_factor:
            raise GeometryError(
                f"The model's rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be above its "
                f"low_freq_factor, {self.low_freq_factor}."
            )


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes and constants of a Llama-family decoder: Llama and Mistral, and with the last two fields Qwen2 and Qwen3.

    Attributes:
        qkv_bias: a bias is added to what q, k and v are projected to (Qwen2).
        qk_norm: each head of q and k goes through an RMSNorm of its own before it is rotated (Qwen3); all query heads
            of a layer share one weight [head_dim], all key heads another.

    Raises:
        GeometryError: a field is of a wrong type, the numbers contradict each other, or no kernel supports them.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "max_positions"):
            _check_count(field, getattr(self, field))
        for field in ("rope_theta", "norm_eps"):
            _check_number(field, getattr(self, field))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise GeometryError(f"The model's rope_scaling is {quote(self.rope_scaling)}; it must be a record or null.")
        for field in ("tied_embeddings", "qkv_bias", "qk_norm"):
            if not isinstance(getattr(self, field), bool):
                raise GeometryError(f"The model's {field} is {quote(getattr(self, field))}; it must be true or false.")
        if self.heads % self.kv_heads:
            raise GeometryError(
                f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly; check the config."
            )
        if self.head_dim not in HEAD_DIMS:
            raise GeometryError(f"head_dim {self.head_dim} is not supported; supported are {HEAD_DIMS}.")

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together: one row of the KV cache."""
        return self.kv_heads * self.head_dim

    @property
    def gqa_ratio(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model: Hugging Face name to shape, projections as [out_features N, in_features K]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (self.hidden,),
                layer + "self_attn.q_proj.weight": (self.q_dim, self.hidden),
                layer + "self_attn.k_proj.weight": (self.kv_dim, self.hidden),
                layer + "self_attn.v_proj.weight": (self.kv_dim, self.hidden),
                layer + "self_attn.o_proj.weight": (self.hidden, self.q_dim),
                layer + "post_attention_layernorm.weight": (self.hidden,),
                layer + "mlp.gate_proj.weight": (self.ffn, self.hidden),
                layer + "mlp.up_proj.weight": (self.ffn, self.hidden),
                layer + "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
            if self.qkv_bias:
                shapes |= {
                    layer + "self_attn.q_proj.bias": (self.q_dim,),
                    layer + "self_attn.k_proj.bias": (self.kv_dim,),
                    layer + "self_attn.v_proj.bias": (self.kv_dim,),
                }
            if self.qk_norm:
                shapes |= dict.fromkeys((f"{layer}self_attn.{x}_norm.weight" for x in "qk"), (self.head_dim,))
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def parameter_count(self) -> int:
        """Number of weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelGeometry":
        """The inverse of `to_dict`.

        Raises:
            GeometryError: a field is missing, unknown, of a wrong type or out of range.
        """
        fields = dict(record)
        scaling = fields.pop("rope_scaling", None)
        try:
            return cls(**fields, rope_scaling=None if scaling is None else RopeScaling(**scaling))
        except TypeError as error:
            raise GeometryError(
                f"The checkpoint's geometry record cannot be read ({short(str(error))}); convert it again."
            ) from error


def layers_fit(geometry: ModelGeometry, tensors: int) -> bool:
    """Whether so many tensors may be all of the model's: checked before an absurd number of layers is listed.

    Up to 1,000 layers, the list is short enough to name what is missing.
    """
    least = geometry.layers if geometry.layers <= 1000 else _TENSORS_OF_A_LAYER * geometry.layers
    return least <= tensors


def rope_inverse_frequencies(geometry: ModelGeometry) -> NDArray[np.float64]:
    """Rotation angle per position of each rotary pair: float64 [head_dim / 2], radians.

    Pair ``i`` is (i, i + head_dim / 2), the Hugging Face order. With Llama 3 scaling, long wavelengths are divided by
    ``factor``, short ones are unchanged, those between are blended (as `transformers` does for ``rope_type: llama3``).
    """
    pairs = np.arange(0, geometry.head_dim, 2, dtype=np.float64)
    frequencies: NDArray[np.float64] = geometry.rope_theta ** (-pairs / geometry.head_dim)
    scaling = geometry.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    scaled: NDArray[np.float64] = frequencies * (blend + (1.0 - blend) / scaling.factor)
    return scaled


def _check_count(field: str, value: object) -> None:
    """`value` is an integer (a float or a bool that equals one is none) from 1 to `LARGEST_COUNT`."""
    if type(value) is not int or not 1 <= value <= LARGEST_COUNT:
        raise GeometryError(f"The model's {field} is {quote(value)}; it must be a whole number, at least 1.")


def _check_number(field: str, value: object) -> None:
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise GeometryError(f"The model's {field} is {quote(value)}; it must be a positive finite number.")
