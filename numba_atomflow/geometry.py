"""The shape of a Llama-family model: one frozen record, read from any description of it.

Kernels, plans and sources depend on nothing else of a model. `parameters` lists every tensor that the model has, under
its Hugging Face name; rotary frequencies are computed in `rope_inverse_frequencies` only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import GeometryError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.ops.formats import FP8_E4M3
from numba_atomflow.rope_scaling import RopeScaling, check_count, check_number, scaling_from_dict

GROUP = FP8_E4M3.group  # weights along K that share one scale
HEAD_DIMS = range(32, 257, 16)
Activation = Literal["silu", "gelu_tanh"]
_TENSORS_OF_A_LAYER = 9  # at least: two norms and seven projections
_FLAGS = ("tied_embeddings", "qkv_bias", "qk_norm", "qk_norm_of_all_heads", "pre_norm", "post_norm")
_SCALES = ("rope_theta", "norm_eps", "embedding_scale", "residual_scale", "logit_scale")
_OPTIONAL_SCALES = ("local_rope_theta", "attention_scale", "attention_soft_cap", "logit_soft_cap")


@dataclass(frozen=True)
class ModelGeometry:
    """Sizes and constants of a decoder of the Llama family. The fields after `tied_embeddings` are what other families
    have and Llama has not; their defaults are Llama's.

    Attributes:
        qkv_bias: a bias is added to what q, k and v are projected to (Qwen2).
        qk_norm: each head of q and k goes through an RMSNorm of its own before it is rotated (Qwen3); all query heads
            of a layer share one weight [head_dim], all key heads another.
        qk_norm_of_all_heads: that norm is one over all heads together, with a weight for each element (OLMo 2).
        rotary_dim: how many elements of a head are rotated, the first ones in Hugging Face's order (Phi-4-mini); None:
            all.
        no_rope_layers: layers without RoPE (SmolLM3).
        sliding_window: in `sliding_layers` a token attends to so many positions, its own included; None: to all.
        sliding_layers: layers with a sliding window.
        local_rope_theta: base of RoPE in `sliding_layers`, unscaled (Gemma 3); None: as in the others.
        hidden_act: the function of the MLP's gate.
        pre_norm: an RMSNorm before attention and before the MLP; false in OLMo 2.
        post_norm: an RMSNorm of what attention and the MLP add to the residual stream (Gemma 2 and 3, OLMo 2).
        embedding_scale, residual_scale, attention_scale, logit_scale: factors of the embedding, of what each sublayer
            adds to the stream, of q k^T (None: head_dim^-0.5), and of the logits (Granite, Gemma). They are part of the
            checkpoint's weights (`model.folding`): no kernel knows them.
        attention_soft_cap, logit_soft_cap: c where scores or logits x become c tanh(x / c) (Gemma 2).

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
    qk_norm_of_all_heads: bool = False
    rotary_dim: int | None = None
    no_rope_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    hidden_act: Activation = "silu"
    pre_norm: bool = True
    post_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "max_positions"):
            check_count(field, getattr(self, field))
        for field in (*_SCALES, *(name for name in _OPTIONAL_SCALES if getattr(self, name) is not None)):
            check_number(field, getattr(self, field))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise GeometryError(f"The model's rope_scaling is {quote(self.rope_scaling)}; it must be a record or null.")
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise GeometryError(f"The model's {field} is {quote(getattr(self, field))}; it must be true or false.")
        if self.heads % self.kv_heads:
            raise GeometryError(
                f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads evenly; check the config."
            )
        if self.head_dim not in HEAD_DIMS:
            raise GeometryError(
                f"head_dim {self.head_dim} is not supported; supported are multiples of {HEAD_DIMS.step} from "
                f"{HEAD_DIMS[0]} to {HEAD_DIMS[-1]}."
            )
        self._check_family()

    def _check_family(self) -> None:
        for field in ("no_rope_layers", "sliding_layers"):
            object.__setattr__(self, field, self._checked_layers(field))
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)
        elif self.sliding_layers:
            raise GeometryError("The model has sliding_layers, but no sliding_window.")
        if self.hidden_act not in get_args(Activation):
            names = " or ".join(map(repr, get_args(Activation)))
            raise GeometryError(f"The model's hidden_act is {quote(self.hidden_act)}; it must be {names}.")
        if self.rotary_dim is not None:
            check_count("rotary_dim", self.rotary_dim)
            if self.rotary_dim % 2 or self.rotary_dim >= self.head_dim:
                raise GeometryError(
                    f"The model's rotary_dim is {self.rotary_dim}; it must be even and below head_dim, {self.head_dim}."
                )
        if self.qk_norm_of_all_heads and not self.qk_norm:
            raise GeometryError("The model has qk_norm_of_all_heads, but no qk_norm.")
        folded = (self.attention_scale or 0.0) * math.sqrt(self.head_dim), self.logit_scale / self.embedding_scale
        if max(folded) > float(np.finfo(np.float32).max):  # of weights, by `model.folding`
            raise GeometryError("The model's attention_scale or logit_scale gives a factor that is no float32.")
        self._check_rope()

    def _check_rope(self) -> None:
        """Check that tables of RoPE can be computed: extreme numbers, each valid by itself, may overflow together."""
        magnitude = 1.0 if self.rope_scaling is None else self.rope_scaling.magnitude
        found = [np.array([magnitude])]
        try:
            with np.errstate(all="ignore"):
                found += [rope_inverse_frequencies(self, length) for length in (1, self.max_positions)]
                found.append(rope_inverse_frequencies(self, local=True))
        except (ArithmeticError, ValueError):
            found.append(np.array([math.inf]))
        if not all((values <= np.finfo(np.float32).max).all() for values in found):
            raise GeometryError("The model's rope_theta or rope_scaling gives frequencies that are no numbers.")

    def _checked_layers(self, field: str) -> tuple[int, ...]:
        """A list of layers, ascending."""
        found = getattr(self, field)
        layers = list(found) if isinstance(found, Iterable) else []
        if not isinstance(found, Iterable) or not all(type(i) is int and 0 <= i < self.layers for i in layers):
            raise GeometryError(
                f"The model's {field} is {quote(found)}; it must be a list of layers from 0 to {self.layers - 1}."
            )
        return tuple(sorted(set(layers)))

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
            shapes |= self._parameters_of_layer(f"model.layers.{i}.")
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def _parameters_of_layer(self, layer: str) -> dict[str, tuple[int, ...]]:
        norms = {name: f"{layer}{norm}.weight" for name, norm in self.norm_names().items()}
        shapes: dict[str, tuple[int, ...]] = {
            **{norms[name]: (self.hidden,) for name in norms if name.endswith("attention_norm")},
            layer + "self_attn.q_proj.weight": (self.q_dim, self.hidden),
            layer + "self_attn.k_proj.weight": (self.kv_dim, self.hidden),
            layer + "self_attn.v_proj.weight": (self.kv_dim, self.hidden),
            layer + "self_attn.o_proj.weight": (self.hidden, self.q_dim),
            **{norms[name]: (self.hidden,) for name in norms if name.endswith("ffn_norm")},
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
            widths = (self.q_dim, self.kv_dim) if self.qk_norm_of_all_heads else (self.head_dim, self.head_dim)
            shapes |= {f"{layer}self_attn.{x}_norm.weight": (n,) for x, n in zip("qk", widths, strict=True)}
        return shapes

    def norm_names(self) -> dict[str, str]:
        """A layer's norms of the stream and of what is added to it: name in the checkpoint to Hugging Face's."""
        names = {"attention_norm": "input_layernorm"} if self.pre_norm else {}
        if self.post_norm:
            names["post_attention_norm"] = "post_attention_layernorm"
        if self.pre_norm:
            names["ffn_norm"] = "pre_feedforward_layernorm" if self.post_norm else "post_attention_layernorm"
        if self.post_norm:
            names["post_ffn_norm"] = "post_feedforward_layernorm"
        return names

    def parameter_count(self) -> int:
        """Number of weights; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; `from_dict` reads it back."""
        scaling = self.rope_scaling
        return asdict(self) | {"rope_scaling": None if scaling is None else scaling.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelGeometry":
        """The inverse of `to_dict`.

        Raises:
            GeometryError: a field is missing, unknown, of a wrong type or out of range.
        """
        fields = dict(record)
        scaling = scaling_from_dict(fields.pop("rope_scaling", None))
        try:
            return cls(**fields, rope_scaling=scaling)
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


def rope_inverse_frequencies(geometry: ModelGeometry, length: int = 0, *, local: bool = False) -> NDArray[np.float64]:
    """Rotation angle per position of each rotary pair: float64 [head_dim / 2], radians; 0 where nothing is rotated.

    Pair ``i`` is (i, i + head_dim / 2), the Hugging Face order; for partial RoPE see `model.folding`.

    Args:
        geometry: of the model.
        length: positions of the sequence, on which some scalings depend.
        local: those of layers with a RoPE of their own, `ModelGeometry.local_rope_theta`.
    """
    rotated = geometry.rotary_dim or geometry.head_dim
    theta = geometry.local_rope_theta if local and geometry.local_rope_theta else geometry.rope_theta
    frequencies: NDArray[np.float64] = theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if geometry.rope_scaling is not None and not local:
        frequencies = geometry.rope_scaling.frequencies(frequencies, theta, length)
    return np.pad(frequencies, (0, (geometry.head_dim - rotated) // 2))
