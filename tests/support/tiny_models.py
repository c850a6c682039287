"""Tiny random models on disk, without torch: Hugging Face folders and GGUF files with the same weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.model.config_json import config_json, model_type_of

Weights = dict[str, NDArray[np.float32]]

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2; the 256 bytes follow
SMALLEST_VOCABULARY = 3 + 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_geometry(**changes: Any) -> ModelGeometry:
    """Two layers with hidden size 192 and intermediate size 320, which are not multiples of the group of 128."""
    fields: dict[str, Any] = {
        "layers": 2,
        "hidden": 192,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "ffn": 320,
        "vocabulary": 288,
        "max_positions": 512,
    }
    return ModelGeometry(**(fields | changes))


def random_weights(geometry: ModelGeometry, seed: int = 0) -> Weights:
    """Weights scaled so that activations stay near 1."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in geometry.parameters().items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith(".bias"):
            weights[name] = values
        elif len(shape) == 1:
            weights[name] = (1 + 0.1 * values).astype(np.float32)
        else:
            weights[name] = (values / np.sqrt(shape[1])).astype(np.float32)
    return weights


def as_stored(values: NDArray[np.float32], dtype: str) -> tuple[bytes, NDArray[np.float32]]:
    """The bytes of `values` in a safetensors dtype, and the stored values as float32."""
    match dtype:
        case "F32":
            return values.tobytes(), values
        case "F16":
            half = values.astype(np.float16)
            return half.tobytes(), half.astype(np.float32)
        case "BF16":
            bits = values.view(np.uint32)
            upper = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest even
            return upper.tobytes(), (upper.astype(np.uint32) << 16).view(np.float32)
    raise ValueError(dtype)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header, valid or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str = "F32") -> Weights:
    """Write a safetensors file; returns the stored values as float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, stored = b"", {}
    for name, values in tensors.items():
        raw, stored[name] = as_stored(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))
    return stored


def write_hf_folder(
    folder: Path,
    geometry: ModelGeometry | None = None,
    *,
    weights: Weights | None = None,
    dtype: str = "F32",
    shards: int = 1,
    seed: int = 0,
    model_type: str | None = None,
) -> Weights:
    """Write a complete model folder; returns its weights as float32, rounded to `dtype`."""
    geometry = geometry or tiny_geometry()
    weights = random_weights(geometry, seed) if weights is None else weights
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", hf_config(geometry, model_type))
    write_json(folder / "generation_config.json", {"eos_token_id": 1})
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    if shards == 1:
        return write_safetensors(folder / "model.safetensors", weights, dtype)
    stored: Weights = {}
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {key: weights[key] for key in list(weights)[i::shards]}
        stored |= write_safetensors(folder / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return stored


def write_checkpoint(folder: Path, geometry: ModelGeometry) -> Path:
    """A checkpoint with random weights and `tiny_tokenizer`, converted from a Hugging Face folder beside it."""
    write_hf_folder(folder / "hf", geometry)
    return convert(folder / "hf", folder / "random.safetensors")


def some_tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens of the smallest vocabulary, none of them special."""
    return np.random.default_rng(seed).integers(3, SMALLEST_VOCABULARY, count).tolist()


def hf_config(geometry: ModelGeometry, model_type: str | None = None) -> dict[str, Any]:
    """config.json of a model with the tiny tokenizer's BOS and EOS."""
    return config_json(geometry, model_type) | {"bos_token_id": 0, "eos_token_id": 1}


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD)])
    return tokenizer


def names_in(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def write_json(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record))


# --- GGUF --------------------------------------------------------------------------------------------------------

_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_GGUF_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    path: Path,
    geometry: ModelGeometry | None = None,
    *,
    weights: Weights | None = None,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
    seed: int = 0,
    tokenizer: bool = False,
    fields: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    tensors_per_part: int = 0,
) -> Weights:
    """Write a GGUF file in the layout of llama.cpp's converter; returns its weights as float32, in Hugging Face order.

    Args:
        path: the file.
        geometry: of the model.
        weights: in Hugging Face names and order.
        matrices: type of all matrices; norms are F32.
        seed: of random weights.
        tokenizer: store a byte-level tokenizer of 260 tokens.
        fields: metadata to add or replace; None removes a field.
        architecture: general.architecture; None: that of the geometry.
        tensors_per_part: split the file into parts ``<stem>-00001-of-0000N.gguf`` of as many; 0: do not.
    """
    geometry = geometry or tiny_geometry()
    weights = random_weights(geometry, seed) if weights is None else weights
    arch = architecture or model_type_of(geometry)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=tensors_per_part, small_first_shard=tensors_per_part > 0)
    for key, value in (_gguf_integers(geometry) | dict(fields or {})).items():
        if value is not None:
            add_gguf_field(writer, key, value)
    writer.add_layer_norm_rms_eps(geometry.norm_eps)
    writer.add_rope_freq_base(geometry.rope_theta)
    if tokenizer:
        _add_gguf_tokenizer(writer)
    if geometry.rope_scaling is not None:
        plain = rope_inverse_frequencies(ModelGeometry.from_dict(geometry.to_dict() | {"rope_scaling": None}))
        writer.add_tensor("rope_freqs.weight", (plain / rope_inverse_frequencies(geometry)).astype(np.float32))
    stored: Weights = {}
    for name, values in weights.items():
        kind = GGMLQuantizationType.F32 if values.ndim == 1 else matrices
        stored[name] = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        if model_type_of(geometry) == "llama" and ("q_proj" in name or "k_proj" in name):
            values = _interleaved(values, geometry.head_dim)
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_gguf_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata field, with the type that llama.cpp's converter uses for such values."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _gguf_integers(geometry: ModelGeometry) -> dict[str, Any]:
    arch = model_type_of(geometry)
    return {
        f"{arch}.block_count": geometry.layers,
        f"{arch}.context_length": geometry.max_positions,
        f"{arch}.embedding_length": geometry.hidden,
        f"{arch}.feed_forward_length": geometry.ffn,
        f"{arch}.attention.head_count": geometry.heads,
        f"{arch}.attention.head_count_kv": geometry.kv_heads,
        f"{arch}.attention.key_length": geometry.head_dim,
        f"{arch}.attention.value_length": geometry.head_dim,
        f"{arch}.rope.dimension_count": geometry.head_dim,
        f"{arch}.vocab_size": geometry.vocabulary,
    }


def _add_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens = [BOS, EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_OUTER:
        return _GGUF_OUTER[stem] + ".weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_LAYER[part]}.{kind}"


def _interleaved(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Permute the rows of each head from RoPE pairs (i, i + d/2) to interleaved pairs (2i, 2i + 1)."""
    order = [half * head_dim // 2 + pair for pair in range(head_dim // 2) for half in range(2)]
    heads = values.shape[0] // head_dim
    rows = [head * head_dim + row for head in range(heads) for row in order]
    return np.ascontiguousarray(values[rows])
