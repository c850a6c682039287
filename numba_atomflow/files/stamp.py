"""Whether a file is still the one that was opened: what the operating system says of it, compared with what it said."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from numba_atomflow.errors import AtomFlowError


class FileStamp(NamedTuple):
    """A file's identity and the time of its last change.

    A change of the contents shows in the size or in the time, to the tick of the kernel's clock (some milliseconds).
    """

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """From what `os.stat` or `os.fstat` returned."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def stamps_of(files: Iterable[Path]) -> dict[Path, FileStamp | None]:
    """Each file's stamp as it is now; None for one that cannot be found."""
    return {path: _stamp(path) for path in files}


def check_unchanged(stamps: Mapping[Path, FileStamp | None], error: type[AtomFlowError]) -> None:
    """Every file is still what it was when `stamps` were taken.

    Raises:
        AtomFlowError: of the class `error`, naming the first that is not.
    """
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise error(changed_sentence(path))


@contextmanager
def unchanged(stamps: Mapping[Path, FileStamp | None], error: type[AtomFlowError]) -> Iterator[Callable[[], None]]:
    """Within it, files are read, and must not change meanwhile; yields a function that checks it at any time.

    Raises:
        AtomFlowError: of the class `error`, when it is left, or instead of another error of this program: what was read
            from a file that was being written may have looked damaged.
    """
    check = partial(check_unchanged, stamps, error)
    try:
        yield check
    except AtomFlowError:
        check()
        raise
    check()


def changed_sentence(path: Path) -> str:
    """What to tell about a file that was written to, or replaced, by another program."""
    return f"{path} was changed by another program while it was in use; start again when the file is complete."


def _stamp(path: Path) -> FileStamp | None:
    try:
        return FileStamp.of(path.stat())
    except OSError:
        return None
