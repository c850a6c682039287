"""Atomic writes: a file appears under its name complete or not at all, even after a full disk or a kill."""

import errno
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a temporary file in the same folder and rename it; arguments and errors as those of `write_pieces`."""
    write_pieces(path, [data], replace=replace)


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview], *, replace: bool) -> None:
    """Write a temporary file in the same folder and rename it.

    Args:
        path: the file; its folder exists.
        pieces: its contents, in order.
        replace: replace an existing file; otherwise that is an error.

    Raises:
        FileExistsError: the file exists, and `replace` is False.
        OSError: it cannot be written.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # a full disk may be noticed only here
        if replace:
            partial.replace(path)
        else:
            publish_new(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def publish_new(partial: Path, destination: Path) -> None:
    """Give a complete file its final name, unless a file of that name exists.

    A hard link is atomic. On file systems without hard links (FAT, some network shares) there is a race between the
    check and the renaming.

    Raises:
        FileExistsError: a file of that name exists.
        OSError: the file cannot be linked or renamed.
    """
    try:
        os.link(partial, destination)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(destination):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination)) from error
        partial.replace(destination)
