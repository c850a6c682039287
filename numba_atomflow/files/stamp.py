"""Detect that a file was changed or replaced since it was opened, by its identity, size and modification time."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from numba_atomflow.errors import AtomFlowError


class FileStamp(NamedTuple):
    """A file's identity and the time of its last change.

    A change of contents shows in the size or in the time, at the resolution of the kernel's clock (some milliseconds).
    """

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """From the result of `os.stat` or `os.fstat`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamps_of(files: Iterable[Path]) -> dict[Path, FileStamp | None]:
    """Each file's current stamp; None for one that does not exist."""
    return {path: _stamp(path) for path in files}


def check_unchanged(stamps: Mapping[Path, FileStamp | None], error: type[AtomFlowError]) -> None:
    """Check that no file has changed since `stamps` were taken.

    Raises:
        AtomFlowError: of the class `error`, naming the first file that has changed.
    """
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise error(changed_sentence(path))


@contextmanager
def unchanged(stamps: Mapping[Path, FileStamp | None], error: type[AtomFlowError]) -> Iterator[Callable[[], None]]:
    """A context in which files are read and must not change; yields a function that checks it at any time.

    Raises:
        AtomFlowError: of the class `error`, at the end of the context, or in place of another AtomFlowError: a file
            that is being written may look damaged.
    """
    check = partial(check_unchanged, stamps, error)
    try:
        yield check
    except AtomFlowError:
        check()
        raise
    check()


def changed_sentence(path: Path) -> str:
    """The message about a file that another program wrote to or replaced."""
    return f"{path} was changed by another program while it was in use; start again when the file is complete."


def _stamp(path: Path) -> FileStamp | None:
    try:
        return FileStamp.of(path.stat())
    except OSError:
        return None
