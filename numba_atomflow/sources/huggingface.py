"""Reads the weights of a Hugging Face model folder: config.json and one or more safetensors files.

Weights are float32, float16 or bfloat16, or FP8 with scales in one of the schemes of `fp8_schemes`. The dtype of each
tensor decides, not the lists of module names in config.json.

Formats: https://huggingface.co/docs/transformers/model_doc/llama (config) and
https://huggingface.co/docs/safetensors (weights; sharded ones have model.safetensors.index.json beside them).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.safetensors import TensorEntry, TensorFile, read_tensor_file
from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short
from numba_atomflow.model.folding import factor_of, is_reordered, reordered_rows
from numba_atomflow.ops.fp8 import LARGEST, dequantize_groups
from numba_atomflow.sources.base import MAX_WEIGHT, check_finite, check_parameters, read_bytes, refuse_lfs_pointer
from numba_atomflow.sources.fp8_schemes import UNUSED_SCALES, Block, Fp8Scheme, dequantize_e8m0, grid_of, group_scales
from numba_atomflow.sources.huggingface_config import config_geometry, config_norm_offset, config_scheme
from numba_atomflow.sources.huggingface_families import IMAGE_MODELS
from numba_atomflow.sources.huggingface_names import language_model, split_fused
from numba_atomflow.sources.huggingface_text import folder_text
from numba_atomflow.sources.json_file import read_json

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CODES = "F8_E4M3"
FLOATS = ("F32", "F16", "BF16")
LARGEST_SCALE = MAX_WEIGHT / LARGEST  # see `check_finite`

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE_EMBEDDING = "embed_tokens.weight"  # of a base model, saved without its LM head
_MAX_FILE_NAME = 255  # bytes, on all common file systems
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # a constant buffer in old checkpoints


class HuggingFaceSource:
    """A model folder as a `WeightSource`."""

    kind = "hf"

    def __init__(self, path: Path) -> None:
        self.path = path
        config_path = path / CONFIG
        if not config_path.is_file():
            raise SourceError(f"{path} holds no {CONFIG}; {_advice(path)}.")
        config = read_json(config_path)
        self.geometry = config_geometry(config_path, config)
        scheme = config_scheme(config_path, config)
        index_files, shards = _weight_files(path)
        self._entries = {
            name: (shard.path, entry)
            for shard in shards
            for name, entry in shard.entries.items()
            if not name.endswith(IGNORED_SUFFIX)
        }
        if str(config.get("model_type")) in IMAGE_MODELS:
            self._entries = language_model(self._entries)
        base_model = BASE_EMBEDDING in self._entries and EMBEDDING not in self._entries
        if base_model:
            duplicates = [
                name for name in self._entries if (full := _full_name(name)) != name and full in self._entries
            ]
            if duplicates:
                raise SourceError(f"{path} holds the tensor {short(duplicates[0])} with and without the prefix model.")
            self._entries = {_full_name(name): location for name, location in self._entries.items()}
        self._scales = _extract_scales(self._entries, scheme) if scheme else {}
        self._entries = split_fused(self.geometry, self._entries, self._scales)
        self._norm_offset = config_norm_offset(config_path, config)
        used = tuple(dict.fromkeys(scales.block for scales in self._scales.values()))
        self.fp8_scheme = str(replace(scheme, blocks=used)) if scheme and used else None
        # Some tied models store the matrix under both names; `read` checks that the two are equal.
        shapes = {name: entry.shape for name, (_, entry) in self._entries.items()}
        self._stored_twice = self.geometry.tied_embeddings and shapes.get(HEAD, ()) == shapes.get(EMBEDDING)
        if self._stored_twice:
            del shapes[HEAD]
        if base_model and HEAD not in shapes and not self.geometry.tied_embeddings:
            raise SourceError(
                f"{path} holds a model without its head ({HEAD}), as LlamaModel saves it; save the whole model "
                "(LlamaForCausalLM), or set tie_word_embeddings if the embedding is the head."
            )
        check_parameters(path, self.geometry, shapes)
        _check_dtypes({name: self._entries[name] for name in shapes if name not in self._scales})
        self._names = list(shapes)
        self.text, text_files = folder_text(path, config, self.geometry.vocabulary)
        self.warnings = self.text.warnings
        self.files: tuple[Path, ...] = (config_path, *index_files, *(shard.path for shard in shards), *text_files)

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        start, stop, _ = slice(start, stop).indices(self.shape(name)[0])
        if is_reordered(self.geometry, name):
            (values,) = reordered_rows(self.geometry, start, stop, lambda a, b: (self._checked(name, a, b),))
        else:
            values = self._checked(name, start, stop)
        if name.endswith("norm.weight") and self._norm_offset:
            values = values + np.float32(self._norm_offset)
        factor = factor_of(self.geometry, name)
        return values if factor == 1.0 else values * np.float32(factor)

    def _checked(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows as the file has them; of an embedding that is stored twice, they must be equal."""
        values = self._read(name, start, stop)
        if name == EMBEDDING and self._stored_twice and not np.array_equal(values, self._read(HEAD, start, stop)):
            raise SourceError(
                f"{self.path / CONFIG} says that embeddings are tied, but {HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false if both are meant."
            )
        return values

    def read_fp8(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        if name not in self._scales:
            return None
        if name == EMBEDDING and self._stored_twice:
            self.read(name, start, stop)  # checks that the two are equal
        start, stop, _ = slice(start, stop).indices(self.shape(name)[0])
        factor = np.float32(factor_of(self.geometry, name))
        if is_reordered(self.geometry, name):
            codes, scales = reordered_rows(self.geometry, start, stop, lambda a, b: self._codes_and_scales(name, a, b))
        else:
            codes, scales = self._codes_and_scales(name, start, stop)
        return codes, scales * factor

    def _codes_and_scales(
        self, name: str, start: int, stop: int | None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        path, entry = self._entries[name]
        rows = range(*slice(start, stop).indices(entry.shape[0]))
        codes = self._rows(name, rows)
        if ((codes & 0x7F) == 0x7F).any():
            raise SourceError(f"Tensor {name} of {path} holds a NaN; the file is damaged, get it again.")
        scales = self._scales[name]
        return codes, group_scales(scales.read(), scales.block, rows, entry.shape[1])

    def _read(self, name: str, start: int, stop: int | None) -> NDArray[np.float32]:
        if name in self._scales:
            return dequantize_groups(*self._codes_and_scales(name, start, stop))
        path, entry = self._entries[name]
        rows = range(*slice(start, stop).indices(entry.shape[0]))
        values = _to_float32(path, name, entry, self._rows(name, rows)).reshape(len(rows), *entry.shape[1:])
        check_finite(path, name, values)
        return values

    def _rows(self, name: str, rows: range) -> NDArray[np.uint8]:
        """The bytes of a range of rows: [rows, bytes per row]."""
        path, entry = self._entries[name]
        row_bytes = entry.nbytes // entry.shape[0]
        raw = read_bytes(path, entry.offset + rows.start * row_bytes, len(rows) * row_bytes)
        return raw.reshape(len(rows), row_bytes)


def _full_name(name: str) -> str:
    """The name of a base model's tensor in the complete model, as in transformers."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@dataclass(frozen=True)
class _Scales:
    """The scales of one FP8 weight: position in a file, and block size."""

    name: str
    path: Path
    entry: TensorEntry
    block: Block
    grid: tuple[int, int]

    def read(self) -> NDArray[np.float32]:
        """The scales as a grid of blocks, float32."""
        raw = read_bytes(self.path, self.entry.offset, self.entry.nbytes)
        if self.entry.dtype == "F8_E8M0":
            values = dequantize_e8m0(raw)
        else:
            values = _to_float32(self.path, self.name, self.entry, raw)
        invalid = values[~((values > 0) & (values <= LARGEST_SCALE))]
        if invalid.size:
            raise SourceError(
                f"Tensor {self.name} of {self.path} holds the scale {invalid[0]:.3g}, which is not between 0 and "
                f"{LARGEST_SCALE:.0f}; the file is damaged, get it again."
            )
        return values.reshape(self.grid)


def _extract_scales(entries: dict[str, tuple[Path, TensorEntry]], scheme: Fp8Scheme) -> dict[str, _Scales]:
    """Move the scales out of `entries`; returns them by the name of their weight.

    Raises:
        SourceError: an FP8 weight has no scales, or scales of a wrong shape.
    """
    scales: dict[str, _Scales] = {}
    for name in list(entries):
        weight = scheme.scale_of(name)
        if name.rpartition(".")[2] in UNUSED_SCALES:
            del entries[name]
        elif weight in entries and weight not in scales and _is_fp8_matrix(entries[weight][1]):
            path, entry = entries.pop(name)
            shape = entries[weight][1].shape
            block = scheme.block_of(shape, entry.shape)
            if block is None:
                raise SourceError(
                    f"Tensor {short(name)} of {path} has shape {list(entry.shape)}, not {scheme.shapes_for(shape)}, as "
                    f"{scheme} has for a weight of {list(shape)}."
                )
            scales[weight] = _Scales(name, path, entry, block, grid_of(shape, block))
    for name, (path, entry) in entries.items():
        if entry.dtype == CODES and name not in scales:
            raise SourceError(
                f"Tensor {short(name)} of {path} is FP8, but {path.parent} holds no scale for it "
                f"({scheme.suffixes[0]}); get the complete model."
            )
    return scales


def _is_fp8_matrix(entry: TensorEntry) -> bool:
    return entry.dtype == CODES and len(entry.shape) == 2


def _check_dtypes(entries: Mapping[str, tuple[Path, TensorEntry]]) -> None:
    """Check that all weights can be read: later, others would have been converted in vain.

    Raises:
        SourceError: names the first of another dtype.
    """
    for name, (path, entry) in entries.items():
        if entry.dtype not in FLOATS:
            raise _other_dtype(path, name, entry)


def _other_dtype(path: Path, name: str, entry: TensorEntry) -> SourceError:
    return SourceError(f"Tensor {name} of {path} has dtype {entry.dtype}; supported are F32, F16 and BF16.")


def _to_float32(path: Path, name: str, entry: TensorEntry, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    match entry.dtype:
        case "F32":
            return raw.view("<f4").astype(np.float32, copy=False)
        case "F16":
            return raw.view("<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise _other_dtype(path, name, entry)


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], list[TensorFile]]:
    """The index (if any), and the headers of all weight files."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return (), [_tensor_file(single)]
    if not index.exists():
        raise SourceError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}; {_advice(folder)}.")
    weight_map = _weight_map(index)
    shards = []
    for file_name in shard_names(index):
        if not (folder / file_name).exists():
            raise SourceError(f"{index} names {short(file_name)}, which is not in {folder}; get the complete model.")
        shards.append(_tensor_file(folder / file_name))
    _check_index(index, weight_map, shards)
    return (index,), shards


def _tensor_file(path: Path) -> TensorFile:
    refuse_lfs_pointer(path)
    return read_tensor_file(path, SourceError)


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names.

    Raises:
        SourceError: the index is malformed.
    """
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(value) for value in weight_map.values()):
        raise SourceError(f"{index} has no weight_map from tensor names to files in the same folder.")
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], shards: list[TensorFile]) -> None:
    """Check that every tensor is in exactly one shard, that of the index."""
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.entries:
            if name in found:
                raise SourceError(
                    f"Tensor {short(name)} is both in {found[name]} and in {shard.path.name} of {index.parent}."
                )
            found[name] = shard.path.name
    for name, file_name in weight_map.items():
        if found.get(name) != file_name:
            raise SourceError(f"{index} says that {short(file_name)} holds the tensor {short(name)}, but it does not.")


def _is_file_name(value: Any) -> bool:
    """Whether `value` is a file name without a folder: an index must not refer to other folders."""
    return (
        isinstance(value, str)
        and value not in {"", ".", ".."}
        and len(value.encode()) <= _MAX_FILE_NAME
        and not {"/", "\\", "\0"} & set(value)
    )


def _advice(folder: Path) -> str:
    """Advice for a folder that is not a model folder, from its contents."""
    for pattern, advice in (
        ("*.gguf", "give the GGUF file in it instead: {}"),
        ("pytorch_model*.bin", "convert {} to safetensors first"),
        (SINGLE, "add the model's config.json beside {}"),
        ("*.safetensors", "rename {} to " + SINGLE + ", or give another folder"),
    ):
        for found in sorted(folder.glob(pattern)):
            return advice.format(found.name)
    return "give a folder with config.json and safetensors weights"
