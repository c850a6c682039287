"""The GGUF container: reads and validates metadata and the list of tensors.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf` package
provides type numbers, block sizes and dequantization. Its reader creates several NumPy objects per token of the
vocabulary (5 s and 165 MB for a 98 MB file of 49,152 tokens) and trusts the counts in the file. Here the limits below
bound time and memory. The file is read, not mapped: access to a mapping that another program truncates kills the
process.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# Above the needs of any model (80 fields, 1,000 tensors, 1.3 million array items for the largest vocabulary, 30 MB with
# a tokenizer.json), and low enough that a malicious file costs a few seconds and megabytes.
MAX_ENTRIES = 1 << 16  # fields, or tensors
MAX_ITEMS = 1 << 21  # in all arrays
MAX_HEADER_BYTES = 1 << 27  # bytes
MAX_NAME_BYTES = 1 << 16  # the limit of the format

_SCALARS = {
    kind: struct.Struct(f"<{letter}")
    for kind, letter in (
        (GGUFValueType.UINT8, "B"),
        (GGUFValueType.INT8, "b"),
        (GGUFValueType.UINT16, "H"),
        (GGUFValueType.INT16, "h"),
        (GGUFValueType.UINT32, "I"),
        (GGUFValueType.INT32, "i"),
        (GGUFValueType.FLOAT32, "f"),
        (GGUFValueType.BOOL, "?"),
        (GGUFValueType.UINT64, "Q"),
        (GGUFValueType.INT64, "q"),
        (GGUFValueType.FLOAT64, "d"),
    )
}
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: element type, shape (slowest dimension first), and position in its file."""

    path: Path
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is a whole number of quantization blocks."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes


@dataclass(frozen=True)
class GgufFile:
    """The validated metadata (plain Python values) and tensors of a GGUF file, or of all parts of a split one."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    paths: tuple[Path, ...]


def read_gguf_file(path: Path) -> GgufFile:
    """Read and validate everything before the weights.

    Raises:
        SourceError: the file is unreadable, truncated, damaged, or of an unsupported version.
    """
    try:
        with path.open("rb", buffering=1 << 18) as file:
            cursor = _Cursor(path, file)
            tensor_count, field_count = _preamble(cursor)
            fields = _fields(cursor, field_count)
            tensors = _tensors(cursor, tensor_count, fields)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    return GgufFile(path, fields, tensors, (path,))


class _Cursor:
    """Sequential reader of a file; checks every length against the file size before use."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self._file = file
        self._items_left = MAX_ITEMS

    def require(self, count: int) -> None:
        """Check that the file has `count` more bytes."""
        if count > self.size - self.position:
            raise SourceError(
                f"{self.path} is truncated or damaged: {count} bytes are announced at byte {self.position}, "
                f"the file ends at {self.size}; get the file again."
            )

    def read(self, count: int) -> bytes:
        """Read `count` bytes of the header."""
        self.require(count)
        if count > MAX_HEADER_BYTES - self.position:
            raise SourceError(
                f"{self.path} has more than {MAX_HEADER_BYTES} bytes of metadata, which no model has; "
                "get the file again."
            )
        data = self._file.read(count)
        if len(data) != count:
            raise SourceError(f"{self.path} became shorter while it was read; get the file again.")
        self.position += count
        return data

    def scalar(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.read(layout.size))[0]

    def string(self, max_bytes: int = MAX_HEADER_BYTES) -> str:
        start, length = self.position, self.scalar(_U64)
        if length > max_bytes:
            self.require(length)
            raise SourceError(
                f"{self.path} holds a string of {length} bytes at byte {start}, where {max_bytes} are the most; "
                "get the file again."
            )
        try:
            return self.read(length).decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.path} holds a string that is not UTF-8 at byte {start}; get the file again."
            ) from error

    def value(self) -> Any:
        """A value with its type in front: a number, a string, or a list of either."""
        kind = self.kind()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        return self.string() if kind == GGUFValueType.STRING else self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        start, kind, count = self.position, self.kind(), self.scalar(_U64)
        if kind == GGUFValueType.ARRAY:
            raise SourceError(f"{self.path} holds nested arrays, which no Llama model has.")
        self.require(count * (8 if kind == GGUFValueType.STRING else _SCALARS[kind].size))  # the minimum
        if count > self._items_left:
            raise SourceError(
                f"{self.path} holds an array of {count} items at byte {start}, where all arrays of a model have fewer "
                f"than {MAX_ITEMS}; get the file again."
            )
        self._items_left -= count
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        layout = np.dtype(_SCALARS[kind].format)
        items: list[Any] = np.frombuffer(self.read(layout.itemsize * count), layout).tolist()
        return items

    def kind(self) -> GGUFValueType:
        """Read the type of a value."""
        number = self.scalar(_U32)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise SourceError(
                f"{self.path} is damaged: there is no value type {number} (byte {self.position - 4}); "
                "get the file again."
            ) from error


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return the number of tensors and of metadata fields."""
    magic = cursor.read(len(MAGIC))
    if magic != MAGIC:
        raise SourceError(f"{cursor.path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
    version = cursor.scalar(_U32)
    if version not in VERSIONS:
        big_endian = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
        raise SourceError(
            f"{cursor.path} is GGUF version {version}{big_endian}; versions {VERSIONS} are supported, convert it again."
        )
    tensor_count, field_count = cursor.scalar(_U64), cursor.scalar(_U64)
    cursor.require(24 * tensor_count + 13 * field_count)  # the minimum size of the entries
    if max(tensor_count, field_count) > MAX_ENTRIES:
        raise SourceError(
            f"{cursor.path} claims {tensor_count} tensors and {field_count} metadata fields, where {MAX_ENTRIES} are "
            "the most; get the file again."
        )
    return tensor_count, field_count


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in fields:
            raise SourceError(f"{cursor.path} lists the metadata field {short(key)} twice; get the file again.")
        fields[key] = cursor.value()
    return fields


def _tensors(cursor: _Cursor, count: int, fields: dict[str, Any]) -> dict[str, GgufTensor]:
    listed: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.string(MAX_NAME_BYTES)
        if name in listed:
            raise SourceError(f"{cursor.path} holds the tensor {short(name)} twice; get the file again.")
        listed[name] = _description(cursor, name)

    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise SourceError(
            f"{cursor.path} has general.alignment {quote(alignment)}, which is not a power of two; get the file again."
        )
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {
        name: GgufTensor(cursor.path, kind, shape, data_start + offset, _byte_count(cursor.path, name, kind, shape))
        for name, (kind, shape, offset) in listed.items()
    }
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise SourceError(
                f"Tensor {short(name)} of {cursor.path} is misaligned or overlaps another; get the file again."
            )
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise SourceError(
                f"{cursor.path} is truncated: tensor {short(name)} ends at byte {end}, the file at {cursor.size}; "
                "get the file again."
            )
    return tensors


def _description(cursor: _Cursor, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    """Type, shape (slowest dimension first; the file lists the fastest first) and offset in the data section."""
    dimensions = cursor.scalar(_U32)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise SourceError(f"Tensor {short(name)} of {cursor.path} claims {dimensions} dimensions; get the file again.")
    shape = tuple(cursor.scalar(_U64) for _ in range(dimensions))[::-1]
    number = cursor.scalar(_U32)
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise SourceError(
            f"Tensor {short(name)} of {cursor.path} has type number {number}, unknown to the installed gguf package; "
            "upgrade gguf, or take a file in another quantization."
        ) from error
    return kind, shape, cursor.scalar(_U64)


def _byte_count(path: Path, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise SourceError(
            f"Tensor {short(name)} of {path} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}."
        )
    return math.prod(shape) // block * block_bytes
