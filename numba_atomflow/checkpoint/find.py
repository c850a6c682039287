"""Checkpoint lookup: a file, or a name in the models folder."""

import os
import stat
from pathlib import Path

from numba_atomflow import home
from numba_atomflow.errors import CheckpointError
from numba_atomflow.utils.arguments import file_path

DEFAULT_MODEL = "smollm2-135m-instruct"


def find_checkpoint(path_or_name: str | Path, what: str = "model") -> Path:
    """The file of a checkpoint. A name without a folder is looked up in the models folder first.

    Args:
        what: the option that names it, for messages.

    Raises:
        CheckpointError: it does not exist, or is not a regular file.
        OptionError: it is no valid name of a file.
    """
    file_path(what, path_or_name)  # only checks: its result is a Path, which drops the ./ that tells a path from a name
    text = os.fspath(path_or_name)
    path = home.expand_user(text)
    is_name = Path(text).name == text
    if is_name:
        model_file = home.models() / f"{text}.safetensors"
        if _mode(model_file) is not None:
            path = model_file
    mode = _mode(path)
    if mode is None:
        raise CheckpointError(_unknown_name(text) if is_name else _missing_file(path))
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} is a folder, not a checkpoint; make one from it with `numba-atomflow convert`.")
    if not stat.S_ISREG(mode):  # opening a pipe would block
        raise CheckpointError(f"{path} is not a regular file; copy the checkpoint to a disk and name that file.")
    return path


def _mode(path: Path) -> int | None:
    """st_mode of a file; None if it does not exist or the name is invalid."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # OSError: also too long a name; ValueError: a zero byte
        return None


def _missing_file(path: Path) -> str:
    return f"There is no checkpoint {path}; check the path, or make one with `numba-atomflow convert`."


def _unknown_name(name: str) -> str:
    names = ", ".join(sorted(path.stem for path in home.models().glob("*.safetensors"))) or "none yet"
    return (
        f"There is no model {name!r} in {home.models()} (there: {names}), and no file of that name here; "
        "run `bash scripts/bootstrap.sh` for the default one, or `numba-atomflow convert SOURCE DEST`."
    )
