"""Files that appear under their names complete or not at all: a full disk or a kill leaves no half of one."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file beside its place and move it there.

    Args:
        path: the file; its folder exists.
        data: all of it.
        replace: a file of this name may be there; it stays whole until the new one is.

    Raises:
        FileExistsError: the name is taken, and not to be replaced.
        OSError: it cannot be written.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a disk may be found full as late as here
        if replace:
            partial.replace(path)
        else:
            publish_new(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def publish_new(partial: Path, destination: Path) -> None:
    """Give a complete file its final name, unless that name is taken.

    A hard link is made or refused in one step. File systems without them (FAT, some network shares) leave a moment
    between looking and renaming.

    Raises:
        FileExistsError: the name is taken.
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
