"""Reads the weights of a model from a GGUF file; Mistral has the architecture Llama there.

Metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and `gguf_families` for those of families
beyond Llama. A Llama differs from Hugging Face in two respects: rows of q and k are permuted for interleaved RoPE
(pairs 2i, 2i + 1 instead of i, i + d/2), and the RoPE scaling of Llama 3 is a tensor of divisors, not four numbers.
Phi-3's projections of q, k and v, and of gate and up, are one tensor each.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.model.folding import factor_of, is_reordered, reordered_rows
from numba_atomflow.rope_scaling import Llama3Scaling
from numba_atomflow.sources.base import check_finite, check_parameters, described_by, read_bytes
from numba_atomflow.sources.gguf_computation import refuse_unsupported
from numba_atomflow.sources.gguf_families import (
    FAMILIES,
    LONG_FACTORS,
    SHORT_FACTORS,
    Sizes,
    family_fields,
    longrope_scaling,
)
from numba_atomflow.sources.gguf_fields import GgufFields
from numba_atomflow.sources.gguf_file import GgufFile, GgufTensor
from numba_atomflow.sources.gguf_parts import read_gguf_model
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf

ROPE_FACTORS = "rope_freqs.weight"
_ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
# The values of Llama 3.1, 3.2 and 3.3; a GGUF file does not store them.
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_POSITIONS = 1.0, 4.0, 8192

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_NORM_NAMES = {  # as the checkpoint has them
    "attn_norm": "attention_norm",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "ffn_norm",
    "post_ffw_norm": "post_ffn_norm",
}
_BIASED = ("attn_q", "attn_k", "attn_v")
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GgufSource:
    """A GGUF file as a `WeightSource`."""

    kind = "gguf"
    fp8_scheme: str | None = None

    def __init__(self, path: Path) -> None:
        file = read_gguf_model(path)
        path = file.path  # of the first part, if the file is split
        self.path = path
        self.files = file.paths
        fields = GgufFields(file.fields, path)
        with described_by(path):
            self.geometry = _geometry(file, fields)
        family = FAMILIES[file.fields["general.architecture"]]
        self._interleaved_rope = family.interleaved_rope
        tensors = {name: tensor for name, tensor in file.tensors.items() if name not in _ROPE_TENSORS}
        if family.partial_rope:
            tensors = _unfused(self.geometry, tensors)
        self._tensors = {_hugging_face_name(path, name, self.geometry): tensor for name, tensor in tensors.items()}
        check_parameters(path, self.geometry, {name: tensor.shape for name, tensor in self._tensors.items()})
        _check_types(self._tensors)
        tokens = len(fields.items("tokenizer.ggml.tokens", str) or ())
        if tokens > self.geometry.vocabulary:
            raise SourceError(f"{path} has {tokens} tokens, but embeddings for {self.geometry.vocabulary} only.")
        self.text = assets_from_gguf(file.fields, path)
        self.warnings = self.text.warnings

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        rows = self.shape(name)[0]
        start, stop, _ = slice(start, stop).indices(rows)
        if self._interleaved_rope and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = self._read_rotary(name, start, stop)
        elif is_reordered(self.geometry, name):
            tensor = self._tensors[name]
            (values,) = reordered_rows(self.geometry, start, stop, lambda a, b: (_read_rows(tensor, a, b),))
        else:
            values = _read_rows(self._tensors[name], start, stop)
        factor = factor_of(self.geometry, name)
        if factor != 1.0:
            with np.errstate(over="ignore"):  # what overflows is refused, too
                values = values * np.float32(factor)
        check_finite(self._tensors[name].path, name, values)
        return values

    def read_fp8(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """None: GGUF has no FP8."""

    def _read_rotary(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of q or k in Hugging Face order: reads whole heads and undoes the interleaving."""
        width = self.geometry.head_dim
        first, last = start // width, -(-stop // width)
        stored = _read_rows(self._tensors[name], first * width, last * width)
        pairs = stored.reshape(last - first, width // 2, 2, -1)
        rows = pairs.swapaxes(1, 2).reshape(stored.shape)
        return rows[start - first * width : stop - first * width]


def _unfused(geometry: ModelGeometry, tensors: Mapping[str, GgufTensor]) -> dict[str, GgufTensor]:
    """Rows of Phi-3's fused projections as tensors of their own; what has other sizes stays whole, to be refused."""
    g = geometry
    parts = {
        "attn_qkv": {"attn_q": g.q_dim, "attn_k": g.kv_dim, "attn_v": g.kv_dim},
        "ffn_up": {"ffn_gate": g.ffn, "ffn_up": g.ffn},
    }
    found = dict[str, GgufTensor]()
    for name, tensor in tensors.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        rows = parts.get(part, {})
        if not name.endswith(".weight") or tensor.shape != (sum(rows.values()), g.hidden):
            found[name] = tensor
            continue
        offset = tensor.offset
        for own, count in rows.items():
            nbytes = count * tensor.row_bytes
            found[f"{layer}.{own}.weight"] = replace(tensor, shape=(count, g.hidden), offset=offset, nbytes=nbytes)
            offset += nbytes
    return found


def _hugging_face_name(path: Path, name: str, geometry: ModelGeometry) -> str:
    """The Hugging Face name of a GGUF tensor; the mapping is one-to-one.

    Raises:
        SourceError: the name is not one of a supported model in a GGUF file.
    """
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if _NORM_NAMES.get(part) in geometry.norm_names():
            return f"model.layers.{layer}.{geometry.norm_names()[_NORM_NAMES[part]]}.weight"
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        case ["blk", layer, part, "bias"] if part in _BIASED:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.bias"
    raise SourceError(
        f"{path} holds the tensor {short(name)}, which is not part of a model of this kind in a GGUF file."
    )


def _check_types(tensors: Mapping[str, GgufTensor]) -> None:
    """Check that all tensors can be dequantized: later, other tensors would have been converted in vain.

    Raises:
        SourceError: names the first that cannot.
    """
    supported = dict[GGMLQuantizationType, bool]()
    for name, tensor in tensors.items():
        if tensor.type not in supported:
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
                supported[tensor.type] = True
            except NotImplementedError:
                supported[tensor.type] = False
        if not supported[tensor.type]:
            raise SourceError(
                f"Tensor {name} of {tensor.path} has type {tensor.type.name}, which the gguf package cannot dequantize"
                "; take a file in another quantization."
            )


def _read_rows(tensor: GgufTensor, start: int, stop: int) -> NDArray[np.float32]:
    if len(tensor.shape) == 1:  # a vector is one row of blocks
        return _read_block_rows(tensor, 0, 1)[0, start:stop]
    return _read_block_rows(tensor, start, stop)


def _read_block_rows(tensor: GgufTensor, start: int, stop: int) -> NDArray[np.float32]:
    raw = read_bytes(tensor.path, tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
    # Damaged scales overflow to infinities; check_finite rejects them.
    with np.errstate(all="ignore"):
        values = dequantize(raw.reshape(stop - start, tensor.row_bytes), tensor.type)
    return np.asarray(values, np.float32)


def _geometry(file: GgufFile, fields: GgufFields) -> ModelGeometry:
    arch = _architecture(fields)
    layers, hidden = fields.integer(f"{arch}.block_count"), fields.integer(f"{arch}.embedding_length")
    heads = fields.integer_of_layers(f"{arch}.attention.head_count", layers)
    if heads < 1 or (hidden % heads and f"{arch}.attention.key_length" not in fields):
        raise SourceError(f"{file.path} has hidden size {hidden} and {heads} attention heads, which do not fit.")
    head_dim = fields.integer(f"{arch}.attention.key_length", hidden // heads)
    rotated = fields.integer(f"{arch}.rope.dimension_count", head_dim)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        is_partial = key.endswith("dimension_count") and FAMILIES[arch].partial_rope and rotated < head_dim
        if fields.integer(key, head_dim) != head_dim and not is_partial:
            raise SourceError(f"{file.path} has {key} {file.fields[key]}, but heads of {head_dim}; they must be equal.")
    refuse_unsupported(fields, arch, head_dim, FAMILIES[arch].keys)
    max_positions = fields.integer(f"{arch}.context_length")
    family = family_fields(fields, arch, Sizes(layers, hidden, heads, head_dim, max_positions))
    if FAMILIES[arch].window is None:  # the context is limited to a sliding window; 0: no window
        max_positions = min(max_positions, fields.integer(f"{arch}.attention.sliding_window", 0) or max_positions)
    geometry = ModelGeometry(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer_of_layers(f"{arch}.attention.head_count_kv", layers, heads),
        head_dim=head_dim,
        ffn=fields.integer_of_layers(f"{arch}.feed_forward_length", layers),
        vocabulary=fields.integer(f"{arch}.vocab_size", len(fields.items("tokenizer.ggml.tokens", str) or ()) or None),
        max_positions=max_positions,
        rope_theta=fields.number(f"{arch}.rope.freq_base", 10000.0),
        norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        tied_embeddings="output.weight" not in file.tensors,
        rotary_dim=rotated if rotated < head_dim else None,
        **family,
    )
    if SHORT_FACTORS in file.tensors or LONG_FACTORS in file.tensors:
        return _with_longrope(file, fields, geometry)
    if ROPE_FACTORS not in file.tensors:
        return geometry
    return _with_llama3_scaling(file, fields, geometry)


def _architecture(fields: GgufFields) -> str:
    """The architecture, which is also the prefix of metadata keys.

    Raises:
        SourceError: the architecture is not supported.
    """
    arch = fields.values.get("general.architecture")
    if arch not in FAMILIES:
        raise SourceError(
            f"{fields.label} is of the architecture {quote(arch)}; supported are {', '.join(map(repr, FAMILIES))}."
        )
    return str(arch)


def _with_longrope(file: GgufFile, fields: GgufFields, geometry: ModelGeometry) -> ModelGeometry:
    """`geometry` with the LongRopeScaling whose divisors are two tensors [rotated / 2]."""
    arch, pairs = _architecture(fields), (geometry.rotary_dim or geometry.head_dim) // 2
    factors = []
    for name in (SHORT_FACTORS, LONG_FACTORS):
        tensor = file.tensors.get(name)
        if not FAMILIES[arch].partial_rope or tensor is None or tensor.shape != (pairs,):
            raise SourceError(f"{file.path} has no {name} with {pairs} factors of RoPE, as Phi-3 has; get it again.")
        values = _read_rows(tensor, 0, pairs)
        check_finite(file.path, name, values)
        factors.append(tuple(map(float, values)))
    return replace(geometry, rope_scaling=longrope_scaling(fields, arch, geometry.max_positions, *factors))


def _with_llama3_scaling(file: GgufFile, fields: GgufFields, geometry: ModelGeometry) -> ModelGeometry:
    """`geometry` with the Llama3Scaling that corresponds to the stored divisors [head_dim / 2]."""
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.shape != (geometry.head_dim // 2,):
        raise SourceError(f"Tensor {ROPE_FACTORS} of {file.path} has shape {tensor.shape}, not one factor per pair.")
    factors = _read_rows(tensor, 0, geometry.head_dim // 2)
    check_finite(file.path, ROPE_FACTORS, factors)
    if factors.min() < 1:
        raise SourceError(f"Tensor {ROPE_FACTORS} of {file.path} holds a factor below 1, which Llama 3 does not have.")
    scaling = Llama3Scaling(
        factor=float(str(factors.max())),
        low_freq_factor=LLAMA3_LOW_FREQ_FACTOR,
        high_freq_factor=LLAMA3_HIGH_FREQ_FACTOR,
        original_max_positions=fields.integer(
            f"{file.fields['general.architecture']}.rope.scaling.original_context_length", LLAMA3_ORIGINAL_POSITIONS
        ),
    )
    scaled = replace(geometry, rope_scaling=scaling)
    plain = rope_inverse_frequencies(geometry)
    if not np.allclose(rope_inverse_frequencies(scaled), plain / factors, rtol=1e-4, atol=0.0):
        raise SourceError(f"{file.path} scales RoPE by factors ({ROPE_FACTORS}) that are not those of Llama 3.")
    return scaled
