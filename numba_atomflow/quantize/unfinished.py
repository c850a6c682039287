"""The layers that are done, on disk: a quantisation that was killed goes on where it was.

A folder beside the destination, ``<name>.unfinished``, locked by the process that works in it:

    job.json          what is being made of what; for another job these files are removed
    layer.{i}.npz     tensors and errors of a finished layer
    stream.{i}.npy    the residual stream before layer i, of which there is one: layers below i are finished

Every file gets its name when it is complete, so a process may be killed at any moment.
"""

import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.checkpoint_writer import explanation
from numba_atomflow.errors import DestinationError
from numba_atomflow.quantize.layer import QuantisedLayer

_ERRORS = "error/"  # before a projection's name
_OWN_FILES = ("job.json*", "layer.*.npz*", "stream.*.npy*")


class Unfinished:
    """A context manager over the folder of one job.

    Args:
        destination: of the checkpoint.
        job: JSON-ready; everything that the result depends on.

    Raises:
        DestinationError: another process is at work, the folder cannot be written, or a file in it is damaged.
    """

    def __init__(self, destination: Path, job: Mapping[str, Any]) -> None:
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".unfinished")
        self._job = json.dumps(job, sort_keys=True)
        self._lock: BinaryIO

    def __enter__(self) -> Self:
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise DestinationError(
                f"{self.destination} is being made by another process; wait for it, or choose another name."
            ) from error
        except OSError as error:  # a file system without locks
            self._lock.close()
            raise DestinationError(explanation(self.destination, error)) from error
        try:
            with self._explained():
                self._keep_own_job()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def _keep_own_job(self) -> None:
        path = self.folder / "job.json"
        if path.exists() and path.read_bytes() == self._job.encode():
            return
        for pattern in _OWN_FILES:  # and nothing else that a user may keep in a folder of this name
            for old in self.folder.glob(pattern):
                old.unlink()
        self._write(path, lambda file: file.write(self._job.encode()))

    def finished(self) -> int:
        """How many layers are done, the first ones."""
        streams = [int(path.suffixes[0][1:]) for path in self.folder.glob("stream.*.npy")]
        done = max(streams, default=0)
        return done if all(self._layer(i).exists() for i in range(done)) else 0

    def stream(self, layer: int) -> NDArray[np.float32]:
        """The residual stream before a layer, as it was saved."""
        with self._readable(self._stream(layer)) as file:
            stream: NDArray[np.float32] = np.load(file, allow_pickle=False)
        return stream

    def save(self, layer: int, result: QuantisedLayer, stream: NDArray[np.float32]) -> None:
        """A layer is done; `stream` is what comes out of it."""
        arrays = result.tensors | {_ERRORS + name: np.array(pair) for name, pair in result.errors.items()}
        with self._explained():
            # NumPy 2.2 and later annotate a keyword, allow_pickle, that earlier ones would store as an array.
            self._write(self._layer(layer), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            self._write(self._stream(layer + 1), lambda file: np.save(file, stream))
            self._stream(layer).unlink(missing_ok=True)

    def layer(self, layer: int) -> QuantisedLayer:
        """A finished layer."""
        with self._readable(self._layer(layer)) as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        errors = {name.removeprefix(_ERRORS): arrays.pop(name) for name in list(arrays) if name.startswith(_ERRORS)}
        return QuantisedLayer(arrays, {name: (float(pair[0]), float(pair[1])) for name, pair in errors.items()})

    def remove(self) -> None:
        """All is done, and in the checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer.{layer}.npz"

    def _stream(self, layer: int) -> Path:
        return self.folder / f"stream.{layer}.npy"

    def _write(self, path: Path, fill: Callable[[BinaryIO], Any]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @contextmanager
    def _readable(self, path: Path) -> Iterator[BinaryIO]:
        try:
            with path.open("rb") as file:
                yield file
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DestinationError(f"{path} is damaged; delete {self.folder} and start again.") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(explanation(self.destination, error)) from error
