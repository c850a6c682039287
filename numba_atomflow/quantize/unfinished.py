"""The layers that are done, on disk: a quantisation that was killed goes on where it was.

A folder beside the destination, ``<name>.unfinished``, locked by the process that works in it:

    job.json          what is being made of what; for another job these files are removed
    layer.{i}.npz     tensors and errors of a finished layer
    stream.{i}.npy    the residual stream before layer i, of which there is one: layers below i are finished

Every file gets its name when it is complete, so a process may be killed at any moment. Arrays stand behind the SHA-256
of the job, the file's name and themselves: a file that was damaged, altered or put in another's place is refused.
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

from numba_atomflow.checkpoint.writer import explanation
from numba_atomflow.errors import DestinationError
from numba_atomflow.quantize.layer import QuantisedLayer

_ERRORS = "error/"  # before a projection's name
_OWN_FILES = ("job.json*", "layer.*.npz*", "stream.*.npy*")
_STREAM = re.compile(r"stream\.([0-9]{1,9})\.npy")
_DIGEST = hashlib.sha256().digest_size
_READ_AT_ONCE = 1 << 20  # bytes
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]  # of a layer's tensors: names to dtypes and shapes


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
        if path.is_file() and path.read_bytes() == self._job.encode():
            return
        self._remove_own()
        self._publish(path, lambda file: file.write(self._job.encode()))

    def finished(self) -> int:
        """How many layers are done, the first ones; all of them are looked through.

        Raises:
            DestinationError: one is damaged.
        """
        numbers = [int(found[1]) for path in self.folder.iterdir() if (found := _STREAM.fullmatch(path.name))]
        layers = 0
        while self._layer(layers).exists():
            layers += 1
        done = max((number for number in numbers if number <= layers), default=0)
        for i in range(done):
            with self._arrays(self._layer(i)):
                pass
        return done

    def stream(self, layer: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The residual stream before a layer, float32 of this shape, as it was saved.

        Raises:
            DestinationError: it is damaged.
        """
        path = self._stream(layer)
        with self._arrays(path) as file:
            stream: NDArray[np.float32] = np.load(file, allow_pickle=False)
        if (stream.dtype, stream.shape) != (np.dtype(np.float32), shape):
            raise self._damaged(path)
        return stream

    def save(self, layer: int, result: QuantisedLayer, stream: NDArray[np.float32]) -> None:
        """A layer is done; `stream` is what comes out of it."""
        arrays = result.tensors | {_ERRORS + name: np.array(pair) for name, pair in result.errors.items()}
        with self._explained():
            # NumPy 2.2 and later annotate a keyword, allow_pickle, that earlier ones would store as an array.
            self._write(self._layer(layer), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
            self._write(self._stream(layer + 1), lambda file: np.save(file, stream))
            self._stream(layer).unlink(missing_ok=True)

    def layer(self, layer: int, layout: Layout) -> QuantisedLayer:
        """A finished layer, whose tensors are those of a layout.

        Raises:
            DestinationError: it is damaged.
        """
        path = self._layer(layer)
        with self._arrays(path) as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        errors = {name.removeprefix(_ERRORS): arrays.pop(name) for name in list(arrays) if name.startswith(_ERRORS)}
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        if found != dict(layout) or not all(_is_pair(pair) for pair in errors.values()):
            raise self._damaged(path)
        return QuantisedLayer(arrays, {name: (float(pair[0]), float(pair[1])) for name, pair in errors.items()})

    def remove(self) -> None:
        """All is done, and in the checkpoint. What a user keeps in the folder stays there."""
        with suppress(OSError):
            self._remove_own()
            (self.folder / "lock").unlink()
            self.folder.rmdir()

    def _remove_own(self) -> None:
        for pattern in _OWN_FILES:
            for old in self.folder.glob(pattern):
                old.unlink()

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer.{layer}.npz"

    def _stream(self, layer: int) -> Path:
        return self.folder / f"stream.{layer}.npy"

    def _write(self, path: Path, fill: Callable[[BinaryIO], Any]) -> None:
        """A file of arrays, behind its digest."""

        def fill_and_sign(file: BinaryIO) -> None:
            file.seek(_DIGEST)
            fill(file)
            digest = self._digest(path, file)
            file.seek(0)
            file.write(digest)

        self._publish(path, fill_and_sign)

    def _publish(self, path: Path, fill: Callable[[BinaryIO], Any]) -> None:
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @contextmanager
    def _arrays(self, path: Path) -> Iterator[BinaryIO]:
        """A file of arrays, where they begin; to be read within it.

        Raises:
            DestinationError: it cannot be read, or is not what was written.
        """
        with self._readable(path), path.open("rb") as file:
            if file.read(_DIGEST) != self._digest(path, file):
                raise self._damaged(path)
            file.seek(_DIGEST)
            yield file

    def _digest(self, path: Path, file: BinaryIO) -> bytes:
        """Of the job, the name and what is behind the digest's place."""
        digest = hashlib.sha256(f"{self._job}\0{path.name}\0".encode())
        file.seek(_DIGEST)
        while piece := file.read(_READ_AT_ONCE):
            digest.update(piece)
        return digest.digest()

    def _damaged(self, path: Path) -> DestinationError:
        return DestinationError(f"{path} is damaged; delete {self.folder} and start again.")

    @contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except DestinationError:
            raise
        except Exception as error:  # NumPy's readers, those of ZIP archives included, raise all kinds
            raise self._damaged(path) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(explanation(self.destination, error)) from error


def _is_pair(values: NDArray[Any]) -> bool:
    return (values.dtype, values.shape) == (np.dtype(np.float64), (2,)) and bool(np.isfinite(values).all())
