"""Reading the JSON files of a model folder, with errors that name the file and the key."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import load_json, quote, short
from numba_atomflow.sources.base import refuse_lfs_pointer

_LARGEST_INTEGER = 1 << 64  # JSON integers are unbounded; larger ones are no size, and no float holds the largest


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        SourceError: the file is missing, unreadable or malformed, or does not hold an object.
    """
    return parse_json(path, read_file(path))


def read_file(path: Path) -> bytes:
    """Read a small file.

    Raises:
        SourceError: the file cannot be read.
    """
    refuse_lfs_pointer(path)
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # byte order mark
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Parse JSON that must be an object; `path` is for messages.

    Raises:
        SourceError: the data are malformed, or not an object.
    """
    try:
        record = load_json(data)
    except ValueError as error:
        raise SourceError(f"{path} is not valid JSON ({error}); get the file again.") from error
    if not isinstance(record, dict):
        raise SourceError(f"{path} holds a JSON {type(record).__name__}, not an object; get the file again.")
    return record


def integer(path: Path, record: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """`record[key]`, which must be an integer of up to 64 bits; null and absent are `default`."""
    value = record.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST_INTEGER:
        raise unusable(path, key, value)
    return value


def number(path: Path, record: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """`record[key]`, which must be a finite positive number; null and absent are `default`."""
    value = record.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise unusable(path, key, value)
    try:
        number = float(value)
    except OverflowError:  # JSON integers are unbounded
        number = math.inf
    if not 0 < number < math.inf:
        raise unusable(path, key, value)
    return number


def mapping(path: Path, record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`record[key]`, which must be an object; null and absent are an empty one."""
    value = record.get(key) or {}  # some files have false for none
    if not isinstance(value, dict):
        raise unusable(path, key, value)
    return value


def flag(path: Path, record: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """`record[key]`, which must be true or false; null and absent are `default`."""
    value = record.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise unusable(path, key, value)
    return value


def unusable(path: Path, key: str, value: Any) -> SourceError:
    """The error for a value of a wrong type or size; None: the key is missing."""
    if value is None:
        return SourceError(f"{path} lacks {key}; get the complete model.")
    return SourceError(f"{path} has an unusable value for {short(key)}: {quote(value)}.")
