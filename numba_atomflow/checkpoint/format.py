"""The FP8 checkpoint format: one safetensors file, which the engine memory-maps.

Tensors, with V vocabulary, H hidden and weights row-major [N, K] in codes F8_E4M3 and scales F32 [N, ceil(K / 128)]:

    embedding.weight, embedding.scale            [V, H]
    layer.{i}.attention_norm                     F32 [H], not in OLMo 2
    layer.{i}.qkv.weight, .scale                 [(heads + 2 kv_heads) * head_dim, H]: rows of q, of k, of v
    layer.{i}.qkv_bias                           F32 [(heads + 2 kv_heads) * head_dim], only with a bias (Qwen2)
    layer.{i}.q_norm, layer.{i}.k_norm           F32 [head_dim], only with norms of q and k (Qwen3); of all heads
                                                 together, [heads * head_dim] and [kv_heads * head_dim] (OLMo 2)
    layer.{i}.o.weight, .scale                   [H, heads * head_dim]
    layer.{i}.post_attention_norm                F32 [H], only with norms of what is added (Gemma 2 and 3, OLMo 2)
    layer.{i}.ffn_norm                           F32 [H], not in OLMo 2
    layer.{i}.post_ffn_norm                      F32 [H], as post_attention_norm
    layer.{i}.gate_up.weight, .scale             [2 * ffn, H]: rows of gate, of up
    layer.{i}.down.weight, .scale                [H, ffn]
    final_norm                                   F32 [H]
    vocabulary.weight, .scale                    [V, H], only if embeddings are not tied
    tokenizer.json                               U8 [bytes], if there is one

The LM head (with tied embeddings: the embedding) may be F16 [V, H] without a scale; its dtype tells which.

Order of tensors: F32, F16, codes, tokenizer. The header is padded with spaces so that the data after F32 is aligned to
128 bytes. The metadata holds JSON records: geometry, quantiser, source and its SHA-256, text, and calibration where
there was one.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.safetensors import TensorEntry, TensorFile, read_tensor_file
from numba_atomflow.errors import CheckpointError, GeometryError
from numba_atomflow.files.untrusted import load_json, quote, short
from numba_atomflow.geometry import ModelGeometry, layers_fit
from numba_atomflow.memory.mapped_file import MappedFile
from numba_atomflow.model.formats import HeadFormat, head_part, matrix_format
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.utils.arguments import file_path

FORMAT = "numba-atomflow"
FORMAT_VERSION = "1"
TOKENIZER = "tokenizer.json"
CODES, SCALES, FP16, BYTES = "F8_E4M3", "F32", "F16", "U8"

DTYPES: dict[str, np.dtype[Any]] = {
    CODES: np.dtype(np.uint8),
    SCALES: np.dtype("<f4"),
    FP16: np.dtype("<f2"),
    BYTES: np.dtype(np.uint8),
}
_DTYPE_OF_ELEMENT = {"float8_e4m3fn": CODES, "float16": FP16}
_VERIFY_BYTES = 1 << 20  # per read


def fusion(geometry: ModelGeometry) -> dict[str, tuple[str, ...]]:
    """The parts of a checkpoint, each with the Hugging Face tensors that are concatenated (along rows) in it.

    A part of matrices is stored as two tensors, ``<part>.weight`` and ``<part>.scale``; a part of vectors (norms, a
    bias) as one with the part's name.
    """
    parts: dict[str, tuple[str, ...]] = {"embedding": ("model.embed_tokens.weight",)}
    for i in range(geometry.layers):
        prefix = f"model.layers.{i}."
        norms = {f"layer.{i}.{name}": (f"{prefix}{norm}.weight",) for name, norm in geometry.norm_names().items()}
        parts |= {name: norms[name] for name in norms if name.endswith("attention_norm")}
        parts |= {
            f"layer.{i}.qkv": tuple(f"{prefix}self_attn.{name}_proj.weight" for name in "qkv"),
            f"layer.{i}.o": (prefix + "self_attn.o_proj.weight",),
            **{name: norms[name] for name in norms if name.endswith("ffn_norm")},
            f"layer.{i}.gate_up": (prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight"),
            f"layer.{i}.down": (prefix + "mlp.down_proj.weight",),
        }
        if geometry.qkv_bias:
            parts[f"layer.{i}.qkv_bias"] = tuple(f"{prefix}self_attn.{name}_proj.bias" for name in "qkv")
        if geometry.qk_norm:
            parts |= {f"layer.{i}.{name}_norm": (f"{prefix}self_attn.{name}_norm.weight",) for name in "qk"}
    parts["final_norm"] = ("model.norm.weight",)
    if not geometry.tied_embeddings:
        parts["vocabulary"] = ("lm_head.weight",)
    return parts


def tensor_layout(geometry: ModelGeometry, head: HeadFormat = "fp8") -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint but the tokenizer: name to safetensors dtype and shape."""
    shapes = geometry.parameters()
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for part, tensors in fusion(geometry).items():
        rows, width = sum(shapes[name][0] for name in tensors), shapes[tensors[0]][1:]
        if not width:
            layout[part] = (SCALES, (rows,))
            continue
        (columns,) = width
        weights = matrix_format(geometry, part, head)
        layout[part + ".weight"] = (_DTYPE_OF_ELEMENT[weights.element], (rows, columns))
        if weights.scaled:
            layout[part + ".scale"] = (SCALES, (rows, -(-columns // weights.group)))
    return layout


class Checkpoint:
    """An FP8 checkpoint, mapped read-only. Use it as a context manager, or `close` it.

    Opening reads only the header and checks it against the geometry and the file size; `verify` reads the tensors.
    Arrays are views of the file: if another program writes to it, they change, and `check_unchanged` raises.

    Args:
        file: the parsed header.
        private_copy: read the file into memory instead of mapping it; takes as much memory as the file is long.
    """

    path: Path
    geometry: ModelGeometry
    text: TextAssets
    metadata: dict[str, str]
    head: HeadFormat  # of the LM head
    payload_bytes: int  # weights, scales and norms

    def __init__(self, file: TensorFile, *, private_copy: bool = False) -> None:
        self.path, self.metadata = file.path, file.metadata
        self._entries = file.entries
        self.geometry = _geometry(file)
        for key in ("quantiser", "source"):  # other modules read them from the metadata
            _record(file, key)
        self.head = _head_format(file, self.geometry)
        _check_tensors(file, self.geometry, self.head)
        self.payload_bytes = sum(entry.nbytes for name, entry in file.entries.items() if name != TOKENIZER)
        self._file = MappedFile(file.path, file.stamp, CheckpointError, private_copy=private_copy)
        try:
            entry = self._entries.get(TOKENIZER)
            tokenizer = None if entry is None else self._file.read(entry.offset, entry.nbytes)
            self.text = TextAssets.from_dict(_record(file, "text"), tokenizer)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def open(cls, path: Path | str, *, private_copy: bool = False) -> Self:
        """Open the checkpoint at `path`.

        Raises:
            CheckpointError: the file is missing, damaged, of another format version, or of another program.
        """
        path = file_path("path", path)
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; give an FP8 checkpoint, or convert the folder first.")
        with suppress(OSError), path.open("rb") as file:  # read_tensor_file reports why it cannot be read
            if file.read(4) == b"GGUF":
                raise CheckpointError(f"{path} is a GGUF file; convert it first: `numba-atomflow convert {path} DEST`.")
        return cls(read_tensor_file(path, CheckpointError), private_copy=private_copy)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def array(self, name: str) -> NDArray[Any]:
        """A read-only view into the mapped file: codes and tokenizer as uint8, scales and norms as float32, F16.

        Raises:
            ClosedError: the checkpoint was closed. Earlier arrays stay valid.
            CheckpointError: the file has changed, or cannot be mapped.
        """
        entry = self._entries[name]
        return self._file.array(DTYPES[entry.dtype], entry.shape, entry.offset)

    def release(self, name: str) -> None:
        """Give back the memory of a tensor that is not needed for now; its arrays stay valid."""
        entry = self._entries[name]
        self._file.release(entry.offset, entry.nbytes)

    def matrix(self, part: str) -> NDArray[np.float32]:
        """A projection or the embedding, dequantized: float32 [N, K], a copy."""
        weights = self.array(part + ".weight")
        if weights.dtype == DTYPES[FP16]:
            return weights.astype(np.float32)
        from numba_atomflow.ops.fp8 import dequantize_groups  # imports numba, which is slow

        return dequantize_groups(weights, self.array(part + ".scale"))

    def verify(self) -> None:
        """Read every tensor: codes without NaN, scales positive and finite, norms and F16 weights finite.

        Reads the file in chunks: reading the mapping would make all of it resident.

        Raises:
            CheckpointError: naming the tensor at fault.
        """
        for name, entry in self._entries.items():
            for values in self._chunks(entry):
                if entry.dtype == CODES:
                    valid = not np.any((values & 0x7F) == 0x7F)
                elif name.endswith(".scale"):
                    valid = bool(np.all(np.isfinite(values) & (values > 0)))
                else:
                    valid = bool(np.all(np.isfinite(values)))
                if not valid:
                    raise CheckpointError(f"Tensor {name} of {self.path} is damaged; convert the model again.")

    def _chunks(self, entry: TensorEntry) -> Iterator[NDArray[Any]]:
        for start in range(0, entry.nbytes, _VERIFY_BYTES):
            data = self._file.read(entry.offset + start, min(entry.nbytes - start, _VERIFY_BYTES))
            yield np.frombuffer(data, DTYPES[entry.dtype])

    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal digits.

        Raises:
            CheckpointError: it cannot be read, or has changed.
        """
        return self._file.sha256()

    def check_unchanged(self) -> None:
        """Check that the file was not written to or truncated since it was opened. Costs one system call.

        Raises:
            CheckpointError: it was; results computed from arrays since the last check must be discarded.
        """
        self._file.check_unchanged()

    def close(self) -> None:
        """Unmap the file; while arrays of it exist, the mapping lives until the last of them is gone."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _geometry(file: TensorFile) -> ModelGeometry:
    found = file.metadata.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{file.path} is not a {FORMAT} checkpoint; make one with `numba-atomflow convert`.")
    version = file.metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file.path} has format version {short(str(version))}, this program reads {FORMAT_VERSION}; "
            "convert the model again."
        )
    try:
        return ModelGeometry.from_dict(_record(file, "geometry"))
    except GeometryError as error:
        raise CheckpointError(f"{file.path} describes a model that cannot be run: {error}") from error


def _record(file: TensorFile, key: str) -> dict[str, Any]:
    try:
        record = load_json(file.metadata.get(key, ""))
    except ValueError as error:
        raise CheckpointError(f"The {key} record of {file.path} is not JSON; convert the model again.") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"The {key} record of {file.path} is not a JSON object; convert the model again.")
    return record


def _head_format(file: TensorFile, geometry: ModelGeometry) -> HeadFormat:
    entry = file.entries.get(head_part(geometry) + ".weight")
    return "fp16" if entry is not None and entry.dtype == FP16 else "fp8"


def _check_tensors(file: TensorFile, geometry: ModelGeometry, head: HeadFormat) -> None:
    if not layers_fit(geometry, len(file.entries)):
        raise CheckpointError(f"{file.path} describes {geometry.layers} layers, but has {len(file.entries)} tensors.")
    layout = tensor_layout(geometry, head)
    for name, (dtype, shape) in layout.items():
        entry = file.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{file.path} lacks the tensor {name}; convert the model again.")
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CheckpointError(
                f"Tensor {name} of {file.path} is {entry.dtype} {quote(list(entry.shape))}, not {dtype} {list(shape)}; "
                "convert the model again."
            )
        if entry.offset % DTYPES[dtype].itemsize:
            raise CheckpointError(f"Tensor {name} of {file.path} is misaligned; convert the model again.")
    for name, entry in file.entries.items():
        if name not in layout and (name != TOKENIZER or entry.dtype != BYTES):
            raise CheckpointError(f"{file.path} holds an unknown tensor {short(name)}; convert the model again.")
