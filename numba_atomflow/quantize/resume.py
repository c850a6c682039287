"""Finished layers on disk, from which an interrupted quantization resumes.

A folder next to the destination, ``<name>.unfinished``, locked by the process that uses it:

    job.json          description of the job; the files of a different job are removed
    layer.{i}.npz     tensors and errors of a finished layer
    stream.{i}.npy    the residual stream before layer i (one file): layers below i are finished

Files are renamed after they are complete, so the process may be killed at any time. Each file of arrays starts with the
SHA-256 of the job, the file name and the contents: a damaged, modified or misplaced file is rejected.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint.writer import write_failure
from numba_atomflow.errors import DestinationError
from numba_atomflow.quantize.layer import QuantizedLayer

_ERRORS = "error/"  # before a projection's name
_FILES = ("job.json*", "layer.*.npz*", "stream.*.npy*")
_STREAM = re.compile(r"stream\.([0-9]{1,9})\.npy")
_DIGEST = hashlib.sha256().digest_size
_CHUNK_BYTES = 1 << 20
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]  # of a layer's tensors: names to dtypes and shapes


class ResumableJob:
    """A context manager for the folder of one job.

    Args:
        destination: the checkpoint file.
        job: JSON-ready description of everything that the result depends on.

    Raises:
        DestinationError: another process uses the folder, it cannot be written, or a file in it is damaged.
    """

    def __init__(self, destination: Path, job: Mapping[str, Any]) -> None:
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".unfinished")
        self._job = json.dumps(job, sort_keys=True)
        self._lock: BinaryIO

    def __enter__(self) -> Self:
        with self._translate_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise DestinationError(
                f"{self.destination} is being written by another process; wait for it, or choose another name."
            ) from error
        except OSError as error:  # the file system has no locks
            self._lock.close()
            raise DestinationError(write_failure(self.destination, error)) from error
        try:
            with self._translate_errors():
                self._discard_other_jobs()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _discard_other_jobs(self) -> None:
        path = self.folder / "job.json"
        if path.is_file() and path.read_bytes() == self._job.encode():
            return
        self._remove_files()
        self._publish(path, lambda file: file.write(self._job.encode()))

    def finished(self) -> int:
        """The number of finished layers, which are the first ones; verifies their files.

        Raises:
            DestinationError: a file is damaged.
        """
        numbers = [int(found[1]) for path in self.folder.iterdir() if (found := _STREAM.fullmatch(path.name))]
        layers = 0
        while self._layer(layers).exists():
            layers += 1
        finished = max((number for number in numbers if number <= layers), default=0)
        for i in range(finished):
            with self._arrays(self._layer(i)):
                pass
        return finished

    def stream(self, layer: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The saved residual stream before a layer, float32 of this shape.

        Raises:
            DestinationError: the file is damaged.
        """
        path = self._stream(layer)
        with self._arrays(path) as file:
            stream: NDArray[np.float32] = np.load(file, allow_pickle=False)
        if (stream.dtype, stream.shape) != (np.dtype(np.float32), shape):
            raise self._damaged(path)
        return stream

    def save(self, layer: int, result: QuantizedLayer, stream: NDArray[np.float32]) -> None:
        """Save a finished layer; `stream` is the residual stream after it."""
        arrays = result.tensors | {_ERRORS + name: np.array(pair) for name, pair in result.errors.items()}
        with self._translate_errors():
            # NumPy before 2.2 would store the keyword allow_pickle, which later versions annotate, as an array.
            self._write(self._layer(layer), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            self._write(self._stream(layer + 1), lambda file: np.save(file, stream))
            self._stream(layer).unlink(missing_ok=True)

    def layer(self, layer: int, layout: Layout) -> QuantizedLayer:
        """A finished layer; its tensors must match the layout.

        Raises:
            DestinationError: the file is damaged.
        """
        path = self._layer(layer)
        with self._arrays(path) as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        errors = {name.removeprefix(_ERRORS): arrays.pop(name) for name in list(arrays) if name.startswith(_ERRORS)}
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if found != dict(layout) or not all(_is_pair(pair) for pair in errors.values()):
            raise self._damaged(path)
        return QuantizedLayer(arrays, {name: (float(pair[0]), float(pair[1])) for name, pair in errors.items()})

    def remove(self) -> None:
        """Remove the job's files after the checkpoint is published, and the folder unless it has other files."""
        with suppress(OSError):
            self._remove_files()
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def _remove_files(self) -> None:
        for pattern in _FILES:
            for old in self.folder.glob(pattern):
                old.unlink()

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer.{layer}.npz"

    def _stream(self, layer: int) -> Path:
        return self.folder / f"stream.{layer}.npy"

    def _write(self, path: Path, fill: Callable[[BinaryIO], Any]) -> None:
        """Write a file of arrays, which starts with its digest."""

        def fill_and_digest(file: BinaryIO) -> None:
            file.seek(_DIGEST)
            fill(file)
            digest = self._digest(path, file)
            file.seek(0)
            file.write(digest)

        self._publish(path, fill_and_digest)

    def _publish(self, path: Path, fill: Callable[[BinaryIO], Any]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @contextmanager
    def _arrays(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file of arrays, positioned after the verified digest.

        Raises:
            DestinationError: the file cannot be read, or its digest differs.
        """
        with self._readable(path), path.open("rb") as file:
            if file.read(_DIGEST) != self._digest(path, file):
                raise self._damaged(path)
            file.seek(_DIGEST)
            yield file

    def _digest(self, path: Path, file: BinaryIO) -> bytes:
        """SHA-256 of the job, the file name and the contents."""
        digest = hashlib.sha256(f"{self._job}\0{path.name}\0".encode())
        file.seek(_DIGEST)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
        return digest.digest()

    def _damaged(self, path: Path) -> DestinationError:
        return DestinationError(f"{path} is damaged; delete {self.folder} and start again.")

    @contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except DestinationError:
            raise
        except Exception as error:  # the exceptions of NumPy's readers and of zipfile are not documented
            raise self._damaged(path) from error

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(write_failure(self.destination, error)) from error


def _is_pair(values: NDArray[Any]) -> bool:
    return (values.dtype, values.shape) == (np.dtype(np.float64), (2,)) and bool(np.isfinite(values).all())
