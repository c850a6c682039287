"""Which checkpoint a user means: a file, or a name in the models folder."""

import os
import stat
from pathlib import Path

from numba_atomflow import home
from numba_atomflow.errors import CheckpointError
from numba_atomflow.utils.arguments import file_path

DEFAULT_MODEL = "smollm2-135m-instruct"


def find_checkpoint(path_or_name: str | Path) -> Path:
    """The checkpoint file that a user means. A name without a folder is looked up in the models folder first.

    Raises:
        CheckpointError: there is none, or it is no regular file.
    """
    file_path("model", path_or_name)  # a usable one; but its Path has lost the ./ that makes a path of a name
    text = os.fspath(path_or_name)
    path = home.expand_user(text)
    is_name = Path(text).name == text
    if is_name:
        named = home.models() / f"{text}.safetensors"
        if _mode(named) is not None:
            path = named
    mode = _mode(path)
    if mode is None:
        raise CheckpointError(_unknown_name(text) if is_name else _missing(path))
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder, not a checkpoint; make one from it with `numba-atomflow convert`.")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for somebody to write into it
        raise CheckpointError(f"{path} is not a regular file; copy the checkpoint to a disk and name that file.")
    return path


def _mode(path: Path) -> int | None:
    """The kind of a file, as `os.stat` has it; None if there is none, or its name is one that no file can have."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # too long a name is an OSError, a zero byte a ValueError
        return None


def _missing(path: Path) -> str:
    return f"There is no checkpoint {path}; check the path, or make one with `numba-atomflow convert`."


def _unknown_name(name: str) -> str:
    known = ", ".join(sorted(path.stem for path in home.models().glob("*.safetensors"))) or "none yet"
    return (
        f"There is no model {name!r} in {home.models()} (there: {known}), and no file of that name here; "
        "run `bash scripts/bootstrap.sh` for the default one, or `numba-atomflow convert SOURCE DEST`."
    )
