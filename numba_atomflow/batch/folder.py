"""The folder of a batch: what the batch is, the shards that are finished, and at the end the results.

    batch.json      what the results depend on: a later run continues only the same batch
    lock            held while a program writes into the folder
    shards/         N.jsonl: the results of shard N, in the order in which they ran
    results.jsonl   all results in the order of the rows; the shards are removed when it is there

Each file appears complete or not at all.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numba_atomflow.errors import DestinationError
from numba_atomflow.files.atomic import write_pieces, write_whole
from numba_atomflow.files.untrusted import load_json
from numba_atomflow.utils.json_text import json_text

Result = dict[str, Any]

# Keys of batch.json, as a message names them.
_NAMES = {
    "rows": "the rows differ",
    "model": "the model differs",
    "task": "the task or its parameters differ",
    "rows_per_shard": "the rows per shard differ",
    "max_seq_len": "the length of the context differs",
    "format_version": "another version of this program wrote it",
}


class BatchFolder:
    """The folder of one batch, open in one program at a time.

    Raises:
        DestinationError: it cannot be written, holds something else or another batch, or is in use.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._shards = path / "shards"
        self.results_path = path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "batch.json").exists() and _holds_files(path):
                raise DestinationError(f"{path} is not empty, and holds no batch; give a new folder.")
            self._lock = (path / "lock").open("a")
            try:
                self._prepare(identity)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise _cannot_be_written(path, error) from error

    def _prepare(self, identity: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DestinationError(
                f"Another program is writing to {self.path}; wait for it, or give another folder."
            ) from None
        described = self.path / "batch.json"
        text = json_text(dict(identity), indent=2)
        if described.exists():
            self._check(described, json.loads(text))
        else:
            write_whole(described, text.encode(), replace=False)
        if not self.finished:
            self._shards.mkdir(exist_ok=True)
        for abandoned in (*self.path.glob(".partial-*"), *self._shards.glob(".partial-*")):
            abandoned.unlink()

    def _check(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            found = load_json(path.read_bytes())
        except ValueError as error:
            raise DestinationError(f"{path} is damaged ({error}); give a new folder.") from None
        for key, value in identity.items():
            if not isinstance(found, dict) or found.get(key) != value:
                raise DestinationError(f"{self.path} belongs to another batch ({_NAMES[key]}); give a new folder.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    @property
    def finished(self) -> bool:
        """Whether the results of all rows are there."""
        return self.results_path.exists()

    def finished_shards(self) -> set[int]:
        """The numbers of the shards whose results are there."""
        return {int(path.stem) for path in self._shards.glob("*.jsonl")}

    def add_shard(self, number: int, results: Iterable[Result]) -> None:
        """Store the results of a shard.

        Raises:
            DestinationError: the disk is full, or the like.
        """
        self._write(self._shards / f"{number:06}.jsonl", results)

    def finish(self, refused: Iterable[Result]) -> None:
        """Write the results of all shards and of the refused rows in the order of their lines, then drop the shards.

        Raises:
            DestinationError: the disk is full, or the like.
        """
        results = [*refused]
        for path in self._shards.glob("*.jsonl"):
            results += _results(path)
        self._write(self.results_path, sorted(results, key=lambda result: result["line"]))
        self.drop_shards()

    def drop_shards(self) -> None:
        """Remove the shards, whose results are in the file of all results."""
        shutil.rmtree(self._shards, ignore_errors=True)

    def _write(self, path: Path, results: Iterable[Result]) -> None:
        try:
            write_pieces(path, (f"{json_text(result)}\n".encode() for result in results), replace=True)
        except OSError as error:
            raise _cannot_be_written(path, error) from error


def _holds_files(path: Path) -> bool:
    """Whether a folder holds anything but what a program leaves there that ended before it had written batch.json."""
    return any(file.name != "lock" and not file.name.startswith(".partial-") for file in path.iterdir())


def read_results(path: Path) -> Iterator[Result]:
    """The results of a file."""
    yield from _results(path)


def _results(path: Path) -> Iterator[Result]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _cannot_be_written(path: Path, error: OSError) -> DestinationError:
    return DestinationError(f"{path} cannot be written ({error.strerror}); make room, or give another folder.")
