"""Writes an FP8 checkpoint incrementally and publishes it atomically.

The file is written as ``<name>.partial-<pid>-<random>``. It is renamed after it is complete, flushed to disk and read
back. The partial file of a killed process stays; the next writer of the same destination removes it, because only the
file of a running writer is locked. (A process id is no proof: containers that share a folder have separate ids.)
"""

import errno
import fcntl
import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import (
    BYTES,
    CODES,
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    FP16,
    SCALES,
    TOKENIZER,
    Checkpoint,
    tensor_layout,
)
from numba_atomflow.checkpoint.safetensors import ITEM_SIZES, METADATA, TensorEntry
from numba_atomflow.errors import DestinationError
from numba_atomflow.files.atomic import publish_new
from numba_atomflow.files.destination import destination_exists
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.formats import HeadFormat
from numba_atomflow.text.codec import TextAssets

ALIGNMENT = 128  # bytes; of the weights
_ORDER = {SCALES: 0, FP16: 1, CODES: 2, BYTES: 3}  # of dtypes in the file; widest first, for alignment


class CheckpointWriter:
    """A context manager that writes one checkpoint file.

    A normal exit checks that all tensors are complete and publishes the file; an exception, Ctrl-C included, removes
    the partial file.

    Args:
        path: the final name.
        geometry: determines the tensors and their shapes.
        text: stored in the metadata, the tokenizer as a tensor.
        quantiser: a JSON-ready record of how the weights were quantized.
        source: a JSON-ready record of the source model.
        head: format of the LM head.
        calibration: a JSON-ready record of the calibration text and the remaining errors.
        overwrite: replace a file that exists at `path` when this one is published.

    Raises:
        DestinationError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        geometry: ModelGeometry,
        text: TextAssets,
        quantiser: Mapping[str, Any],
        source: Mapping[str, Any],
        *,
        head: HeadFormat = "fp8",
        calibration: Mapping[str, Any] | None = None,
        overwrite: bool = True,
    ) -> None:
        self.path = path
        self.overwrite = overwrite
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "geometry": json.dumps(geometry.to_dict()),
            "quantiser": json.dumps(dict(quantiser)),
            "source": json.dumps(dict(source)),
            "text": json.dumps(text.to_dict()),
        }
        if calibration is not None:
            metadata["calibration"] = json.dumps(dict(calibration))
        layout = tensor_layout(geometry, head)
        self._tokenizer = text.tokenizer_json
        if self._tokenizer is not None:
            layout[TOKENIZER] = (BYTES, (len(self._tokenizer),))
        self._header, self._entries = _header(layout, metadata)
        self._partial: Path  # set by `__enter__`, as is the file
        self._file: BinaryIO
        self._written = dict.fromkeys(self._entries, 0)  # bytes per tensor
        self.total_bytes = len(self._header) + sum(entry.nbytes for entry in self._entries.values())

    @property
    def written_bytes(self) -> int:
        """Bytes of tensors written so far."""
        return sum(self._written.values())

    def __enter__(self) -> Self:
        with self._translate_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.path)
            free = shutil.disk_usage(self.path.parent).free
            if free < self.total_bytes:
                raise DestinationError(
                    f"{self.path} needs {self.total_bytes / 1e6:.0f} MB, but only {free / 1e6:.0f} MB are free; "
                    "make room, or choose another folder."
                )
            self._partial, self._file = _open_locked(self.path)
        try:
            self._write_at(0, self._header)
            if self._tokenizer is not None:
                self.write(TOKENIZER, np.frombuffer(self._tokenizer, np.uint8))
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows to a tensor: codes as uint8, scales and norms as float32, F16 as float16.

        Tensors may come in any order; the rows of a tensor in ascending order, in any number of calls.

        Raises:
            DestinationError: the disk is full or unavailable.
            ValueError: the rows do not fit the tensor.
        """
        entry, written = self._entries[name], self._written[name]
        dtype = DTYPES[entry.dtype]
        if rows.dtype != dtype or rows.shape[1:] != entry.shape[1:] or written + rows.nbytes > entry.nbytes:
            raise ValueError(
                f"{rows.dtype} {rows.shape} does not fit {name}: {dtype} {entry.shape}, {written} bytes full"
            )
        self._write_at(entry.offset + written, np.ascontiguousarray(rows).view(np.uint8).data)
        self._written[name] = written + rows.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._discard()  # no effect after publishing

    def _publish(self) -> None:
        incomplete = [name for name, entry in self._entries.items() if self._written[name] != entry.nbytes]
        if incomplete:
            raise ValueError(f"{incomplete[0]} and {len(incomplete) - 1} other tensors were not filled")
        with self._translate_errors():
            os.fsync(self._file.fileno())
        with Checkpoint.open(self._partial) as checkpoint:
            checkpoint.verify()
        with self._translate_errors():
            if self.overwrite:
                self._partial.replace(self.path)
            else:
                try:
                    publish_new(self._partial, self.path)
                except FileExistsError as error:  # created by another process in the meantime
                    raise destination_exists(self.path) from error
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # makes the rename durable
            finally:
                os.close(folder)

    def _discard(self) -> None:
        with suppress(OSError):
            self._partial.unlink()  # before close releases the lock
        self._file.close()

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        with self._translate_errors():
            self._file.seek(offset)
            while left:  # a full disk writes a part first and fails on the next call
                left = left[self._file.write(left) :]

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Operating-system errors become `DestinationError`."""
        try:
            yield
        except OSError as error:
            raise DestinationError(write_failure(self.path, error)) from error


def write_failure(path: Path, error: OSError) -> str:
    """The error message for a failed write of the checkpoint at `path`."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{path} could not be written: the disk is full; make room, or choose another folder."
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"{path} could not be written: {path.parent} is read-only for you; choose another folder."
        case errno.EEXIST | errno.ENOTDIR:
            return f"{path} could not be written: {error.filename} is in the way; remove it or choose another folder."
    return f"{path} could not be written ({error.strerror}); choose another folder."


def _header(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the data, and the position of each tensor in the file."""
    record: dict[str, Any] = {METADATA: dict(metadata)}
    begin, float_bytes = 0, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: _ORDER[item[1][0]]):
        end = begin + ITEM_SIZES[dtype] * math.prod(shape)
        record[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
        float_bytes = end if dtype == SCALES else float_bytes
    text = json.dumps(record, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + float_bytes) % ALIGNMENT)
    start = 8 + len(text)
    entries = {
        name: TensorEntry(dtype, shape, start + record[name]["data_offsets"][0], ITEM_SIZES[dtype] * math.prod(shape))
        for name, (dtype, shape) in layout.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def _open_locked(destination: Path) -> tuple[Path, BinaryIO]:
    """A new partial file of this destination, locked while it is open.

    Another process may remove it as abandoned between creation and lock; then a new one is created.
    """
    while True:
        partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        file = partial.open("xb", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return partial, file
        except BaseException:
            partial.unlink(missing_ok=True)
            file.close()
            raise
        file.close()


def _remove_abandoned(destination: Path) -> None:
    """Remove partial files of this destination that no running process has locked."""
    for partial in destination.parent.glob(glob.escape(destination.name) + ".partial-*"):
        with suppress(OSError), partial.open("rb") as file:  # BlockingIOError: its writer holds the lock
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
