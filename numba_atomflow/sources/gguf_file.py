"""The container format GGUF: metadata and a list of tensors, read and checked to the last byte.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf` package knows the type
numbers and block sizes, and dequantises; its own reader makes several NumPy objects for every token of the vocabulary
(5 s and 165 MB for a 98 MB file of 49,152 tokens) and trusts the counts in the file. This one does neither.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from numba_atomflow.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


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
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            tensor_count, field_count = _preamble(cursor)
            fields = _fields(cursor, field_count)
            tensors = _tensors(cursor, tensor_count, fields)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise SourceError(f"{path} is empty or damaged ({error}); get the file again.") from error
    return GgufFile(path, fields, tensors)


class _Cursor:
    """Reads forward through the mapped file and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.size = len(data)
        self.at = 0
        self._data = data

    def need(self, count: int) -> None:
        if count > self.size - self.at:
            raise SourceError(
                f"{self.path} is truncated or damaged: {count} bytes are announced at byte {self.at}, "
                f"the file ends at {self.size}; get the file again."
            )

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self._data[self.at - count : self.at]

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        at = self.at
        try:
            return self.take(self.scalar("<Q")).decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.path} holds a string that is not UTF-8 at byte {at}; get the file again."
            ) from error

    def value(self) -> Any:
        """A value preceded by its type: a number, a string, or a list of either."""
        kind = self.kind()
        if kind != GGUFValueType.ARRAY:
            return self.string() if kind == GGUFValueType.STRING else self.scalar(_SCALARS[kind])
        kind, count = self.kind(), self.scalar("<Q")
        if kind == GGUFValueType.STRING:
            self.need(8 * count)  # before a list of an absurd length is begun
            return [self.string() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise SourceError(f"{self.path} holds nested arrays, which no Llama model has.")
        layout = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(layout.itemsize * count), layout).tolist()

    def kind(self) -> GGUFValueType:
        number = self.scalar("<I")
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
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        big_endian = " (or it is big-endian)" if version & 0xFFFF == 0 else ""
        raise SourceError(
            f"{cursor.path} is GGUF version {version}{big_endian}; versions {VERSIONS} are supported, convert it again."
        )
    tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    cursor.need(24 * tensor_count + 13 * field_count)  # the least that so many entries take
    return tensor_count, field_count


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in fields:
            raise SourceError(f"{cursor.path} lists the metadata field {key} twice; get the file again.")
        fields[key] = cursor.value()
    return fields


def _tensors(cursor: _Cursor, count: int, fields: dict[str, Any]) -> dict[str, GgufTensor]:
    listed: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
    for _ in range(count):
        name = cursor.string()
        if name in listed:
            raise SourceError(f"{cursor.path} holds the tensor {name} twice; get the file again.")
        listed[name] = _description(cursor, name)

    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise SourceError(f"{cursor.path} has general.alignment {alignment!r}, which is not a power of two.")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GgufTensor(kind, shape, data_start + offset, _byte_count(cursor.path, name, kind, shape))
        for name, (kind, shape, offset) in listed.items()
    }
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise SourceError(f"Tensor {name} of {cursor.path} is misaligned or overlaps another; get the file again.")
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise SourceError(
                f"{cursor.path} is truncated: tensor {name} ends at byte {end}, the file at {cursor.size}; "
                "get the file again."
            )
    return tensors


def _description(cursor: _Cursor, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
    """Type, shape (slowest dimension first; the file lists the fastest first) and offset in the data section."""
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise SourceError(f"Tensor {name} of {cursor.path} claims {dimensions} dimensions; get the file again.")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
    number = cursor.scalar("<I")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise SourceError(
            f"Tensor {name} of {cursor.path} has type number {number}, unknown to the installed gguf package; "
            "upgrade gguf, or take a file in another quantisation."
        ) from error
    return kind, shape, cursor.scalar("<Q")


def _byte_count(path: Path, name: str, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise SourceError(f"Tensor {name} of {path} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block}.")
    return math.prod(shape) // block * block_bytes
