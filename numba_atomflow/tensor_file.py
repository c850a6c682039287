"""A safetensors file: its header read and checked to the last byte, its tensors not touched.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header that maps each
tensor name to dtype, shape and [begin, end) in the data section, then the data with no holes. A header may claim
anything, so nothing is allocated or mapped before every claim has been compared with the size of the file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_atomflow.errors import AtomFlowError

METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000  # bytes; the limit of the format's reference implementation

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
    """One tensor of a file: its element type by its safetensors name, its shape, and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """What the header of a safetensors file says, found consistent with the file."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]


def read_tensor_file(path: Path, error: type[AtomFlowError]) -> TensorFile:
    """Read and check the header of the safetensors file at `path`.

    Raises:
        AtomFlowError: of the class `error`: the file is missing, unreadable, truncated, damaged or no safetensors file.
    """
    header, data_start, file_size = _read_header(path, error)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error(f"The {METADATA} of {path} must map names to strings; the file is damaged, get it again.")
    entries = {name: _entry(path, name, record, data_start, error) for name, record in header.items()}

    # Tensors must follow each other without overlap or hole, and fill the file to its last byte.
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise error(f"Tensor {name} of {path} starts at byte {entry.offset}, not at {end}; the file is damaged.")
        end += entry.nbytes
        if end > file_size:
            raise error(
                f"{path} is truncated: tensor {name} ends at byte {end}, the file at {file_size}; get the file again."
            )
    if end != file_size:
        raise error(f"{path} has {file_size - end} bytes after its last tensor; the file is damaged, get it again.")
    return TensorFile(path, metadata, entries)


def _read_header(path: Path, error: type[AtomFlowError]) -> tuple[dict[str, Any], int, int]:
    """The header, the byte at which the data starts, and the size of the file."""
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if file_size < 8:
                raise error(f"{path} is truncated: it holds {file_size} bytes; get the file again.")
            first = file.read(1)
            if first != b"{" or length > LARGEST_HEADER:
                raise error(f"{path} is not a safetensors file, or its header is damaged; get the file again.")
            if 8 + length > file_size:
                raise error(
                    f"{path} is truncated: its header ends at byte {8 + length}, the file at {file_size}; "
                    "get the file again."
                )
            text = first + file.read(length - 1)
    except FileNotFoundError as problem:
        raise error(f"{path} does not exist; check the path.") from problem
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); check the path and its permissions.") from problem
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as problem:
        raise error(f"The header of {path} is not valid JSON ({problem}); the file is damaged.") from problem
    return header, 8 + length, file_size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is listed twice")
    return record


def _entry(path: Path, name: str, record: Any, data_start: int, error: type[AtomFlowError]) -> TensorEntry:
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise error(f"The header of {path} does not describe tensor {name} by dtype, shape and data_offsets.")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise error(f"Tensor {name} of {path} has dtype {dtype!r}, which is not supported.")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise error(f"Tensor {name} of {path} has impossible shape {shape} or data_offsets {offsets}.")
    begin, end = offsets
    nbytes = ITEM_SIZES[dtype] * math.prod(shape)
    if end - begin != nbytes:
        raise error(f"Tensor {name} of {path} is {dtype} {shape}, {nbytes} bytes, but its data_offsets are {offsets}.")
    return TensorEntry(dtype, tuple(shape), data_start + begin, nbytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, Sequence) and all(type(value) is int and value >= 0 for value in values)
