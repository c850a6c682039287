"""Paths of files to be written: refused before the work is done, not after."""

import stat
from pathlib import Path

from numba_atomflow.errors import DestinationError


def check_destination(path: Path, overwrite: bool) -> None:
    """Check that a file of this name can appear here, if its folder exists or is made.

    Raises:
        DestinationError: a file of this name exists and `overwrite` is False, or there can be none.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink() and not overwrite:  # a dangling link
            raise destination_exists(path) from None
        return
    except OSError as error:
        raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
    if stat.S_ISDIR(mode):
        raise DestinationError(f"{path} is a folder; give the name of a file in it.")
    if not stat.S_ISREG(mode):
        raise DestinationError(f"{path} is a device or a pipe; give the name of a file.")
    if not overwrite:
        raise destination_exists(path)


def check_destination_in_folder(path: Path, overwrite: bool) -> None:
    """`check_destination` where no folder is made.

    Raises:
        DestinationError: as there, or the folder does not exist.
    """
    check_destination(path, overwrite)
    if not path.parent.is_dir():
        raise DestinationError(f"There is no folder {path.parent} for {path.name}; make it first.")


def destination_exists(path: Path) -> DestinationError:
    """The error for an existing destination without `overwrite`."""
    return DestinationError(f"{path} exists; choose another name, or pass --overwrite.")
