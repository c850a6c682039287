"""The safetensors container: reads and validates the header, without reading any tensor.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header that maps each
tensor name to dtype, shape and [begin, end) in the data section, then the data without gaps. The header is
untrusted: nothing is allocated or mapped before its sizes have been checked against the file size.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_atomflow.errors import AtomFlowError
from numba_atomflow.files.stamp import FileStamp
from numba_atomflow.files.untrusted import load_json, quote, short

METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_HEADER_READ = 4 << 20  # bytes; the largest model (405B, 2,300 tensors) needs less than a tenth of it
MAX_DIMENSIONS = 64  # as in NumPy
MAX_SIZE = 2**64 - 1  # of a dimension or an offset

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: safetensors dtype, shape, and position in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """The validated header of a safetensors file. A later open of the file must check `stamp`."""

    path: Path
    stamp: FileStamp
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]


def read_tensor_file(path: Path, error: type[AtomFlowError]) -> TensorFile:
    """Read and validate the header of the safetensors file at `path`.

    Raises:
        AtomFlowError: of class `error`: the file is missing, unreadable, truncated, damaged or not a safetensors file.
    """
    header, data_start, stamp = _read_header(path, error)
    file_size = stamp.size
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"The {METADATA} of {path} must map names to strings; the file is damaged, get it again.")
    entries = {name: _entry(path, name, record, data_start, error) for name, record in header.items()}

    # Tensors must be contiguous, without overlaps or gaps, up to the end of the file.
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise error(
                f"Tensor {short(name)} of {path} starts at byte {entry.offset}, not at {end}; the file is damaged."
            )
        end += entry.nbytes
        if end > file_size:
            raise error(
                f"{path} is truncated: tensor {short(name)} ends at byte {end}, the file at {file_size}; "
                "get the file again."
            )
    if end != file_size:
        raise error(f"{path} has {file_size - end} bytes after its last tensor; the file is damaged, get it again.")
    return TensorFile(path, stamp, metadata, entries)


def file_head(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What precedes the data of a safetensors file: its length and the header, padded to a multiple of 8 bytes.

    Args:
        tensors: dtype and shape by name, in the order of the data, which follow without gaps.
        metadata: of the file.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + ITEM_SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path, error: type[AtomFlowError]) -> tuple[dict[str, Any], int, FileStamp]:
    """The header, the offset of the data, and the stamp of the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading from a pipe would block
            raise error(f"{path} is not a file; check the path.")
        with path.open("rb") as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            file_size = stamp.size
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8:
                raise error(f"{path} is truncated: it holds {file_size} bytes; get the file again.")
            first = file.read(1)
            if first != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
                raise error(f"{path} is not a safetensors file, or its header is damaged; get the file again.")
            if 8 + length > file_size:
                raise error(
                    f"{path} is truncated: its header ends at byte {8 + length}, the file at {file_size}; "
                    "get the file again."
                )
            if length > MAX_HEADER_READ:
                raise error(
                    f"The header of {path} has {length} bytes, more than the {MAX_HEADER_READ} that a model can need; "
                    "the file is damaged."
                )
            text = first + file.read(length - 1)
    except FileNotFoundError as problem:
        raise error(f"{path} does not exist; check the path.") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); check the path and its permissions.") from problem
    try:
        header = load_json(text, unique=True)
    except ValueError as problem:
        raise error(f"The header of {path} is not valid JSON ({problem}); the file is damaged.") from problem
    return header, 8 + length, stamp


def _entry(path: Path, name: str, record: Any, data_start: int, error: type[AtomFlowError]) -> TensorEntry:
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(f"The header of {path} does not describe tensor {short(name)} by dtype, shape and data_offsets.")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise error(f"Tensor {short(name)} of {path} has dtype {quote(dtype)}, which is not supported.")
    if not _are_sizes(shape, MAX_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise error(
            f"Tensor {short(name)} of {path} has impossible shape {quote(shape)} or data_offsets {quote(offsets)}; "
            "the file is damaged."
        )
    begin, end = offsets
    nbytes = ITEM_SIZES[dtype] * math.prod(shape)
    if end - begin != nbytes:
        raise error(
            f"Tensor {short(name)} of {path} is {dtype} {quote(shape)}, {quote(nbytes)} bytes, but its data_offsets "
            f"are {quote(offsets)}; the file is damaged."
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, nbytes)


def _are_sizes(values: Any, max_count: int) -> bool:
    """Whether `values` is a list of at most `max_count` sizes; this bounds the cost of their product."""
    return (
        isinstance(values, list)
        and len(values) <= max_count
        and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)
    )
