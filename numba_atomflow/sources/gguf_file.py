"""The container format GGUF: metadata and a list of tensors, read and checked to the last byte.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf` package knows the type
numbers and block sizes, and dequantises; its own reader makes several NumPy objects for every token of the vocabulary
(5 s and 165 MB for a 98 MB file of 49,152 tokens) and trusts the counts in the file. This one does neither: time and
memory are bounded by the limits below, whatever the file claims. It reads instead of mapping: a mapped file that is
truncated by another program kills the process.
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
from numba_atomflow.files.untrusted import short, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# Above what any model has (80 fields, 1,000 tensors, 1.3 million items in the arrays of the largest vocabulary, 30 MB
# with a whole tokenizer.json), and low enough that a hostile file costs some seconds and megabytes at most.
MAX_ENTRIES = 1 << 16  # fields, or tensors
MAX_ITEMS = 1 << 21  # of all arrays together
MAX_HEADER_BYTES = 1 << 27  # bytes
MAX_NAME_BYTES = 1 << 16  # bytes of a key; the format's own limit

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
    """One tensor: its element type, its shape slowest dimension first, and where its bytes are."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; rows are whole numbers of quantisation blocks."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes


@dataclass(frozen=True)
class GgufFile:
    """Metadata (plain Python values) and tensors of a GGUF file, found consistent with the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_file(path: Path) -> GgufFile:
    """Read and check everything that comes before the weights.

    Raises:
        SourceError: the file is unreadable, truncated, damaged, or of a version that is not supported.
    """
    try:
        with path.open("rb", buffering=1 << 18) as file:
            cursor = _Cursor(path, file)
            tensor_count, field_count = _preamble(cursor)
            fields = _fields(cursor, field_count)
            tensors = _tensors(cursor, tensor_count, fields)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    return GgufFile(path, fields, tensors)


class _Cursor:
    """Reads forward through the file and never past its end: a length is compared with the file's before it is used."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._file = file
        self._items_left = MAX_ITEMS

    def need(self, count: int) -> None:
        if count > self.size - self.at:
            raise SourceError(
                f"{self.path} is truncated or damaged: {count} bytes are announced at byte {self.at}, "
                f"the file ends at {self.size}; get the file again."
            )

    def take(self, count: int) -> bytes:
        self.need(count)
        if count > MAX_HEADER_BYTES - self.at:
            raise SourceError(
                f"{self.path} has more than {MAX_HEADER_BYTES} bytes of metadata, which no model has; "
                "get the file again."
            )
        data = self._file.read(count)
        if len(data) != count:
            raise SourceError(f"{self.path} became shorter while it was read; get the file again.")
        self.at += count
        return data

    def scalar(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def string(self, longest: int = MAX_HEADER_BYTES) -> str:
        at, length = self.at, self.scalar(_U64)
        if length > longest:
            self.need(length)
            raise SourceError(
                f"{self.path} holds a string of {length} bytes at byte {at}, where {longest} are the most; "
                "get the file again."
            )
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.path} holds a string that is not UTF-8 at byte {at}; get the file again."
            ) from error

    def value(self) -> Any:
        """A value preceded by its type: a number, a string, or a list of either."""
        kind = self.kind()
        if kind == GGUFValueType.ARRAY:
            return self._array()
        return self.string() if kind == GGUFValueType.STRING else self.scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        at, kind, count = self.at, self.kind(), self.scalar(_U64)
        if kind == GGUFValueType.ARRAY:
            raise SourceError(f"{self.path} holds nested arrays, which no Llama model has.")
        self.need(count * (8 if kind == GGUFValueType.STRING else _SCALARS[kind].size))  # at least
        if count > self._items_left:
            raise SourceError(
                f"{self.path} holds an array of {count} items at byte {at}, where all arrays of a model have fewer "
                f"than {MAX_ITEMS}; get the file again."
            )
        self._items_left -= count
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        layout = np.dtype(_SCALARS[kind].format)
        items: list[Any] = np.frombuffer(self.take(layout.itemsize * count), layout).tolist()
        return items

    def kind(self) -> GGUFValueType:
        number = self.scalar(_U32)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise SourceError(
                f"{self.path} is damaged: there is no value type {number} (byte {self.at - 4}); get the file again."
            ) from error


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata fields."""
    magic = cursor.take(len(MAGIC))
    if magic != MAGIC:
        raise SourceError(f"{cursor.path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
    version = cursor.scalar(_U32)
    if version not in VERSIONS:
        big_endian = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
        raise SourceError(
            f"{cursor.path} is GGUF version {version}{big_endian}; versions {VERSIONS} are supported, convert it again."
        )
    tensor_count, field_count = cursor.scalar(_U64), cursor.scalar(_U64)
    cursor.need(24 * tensor_count + 13 * field_count)  # the least that so many entries take
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
            f"{cursor.path} has general.alignment {shown(alignment)}, which is not a power of two; get the file again."
        )
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GgufTensor(kind, shape, data_start + offset, _byte_count(cursor.path, name, kind, shape))
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
            "upgrade gguf, or take a file in another quantisation."
        ) from error
    return kind, shape, cursor.scalar(_U64)


def _byte_count(path: Path, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise SourceError(
            f"Tensor {short(name)} of {path} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}."
        )
    return math.prod(shape) // block * block_bytes
