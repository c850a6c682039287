"""The cache folder: checkpoints, downloads and compiled code.

``NUMBA_ATOMFLOW_HOME`` sets the folder; the default is the platform's cache folder.
"""

import os
import sys
from pathlib import Path

from numba_atomflow.errors import OptionError

ENVIRONMENT_VARIABLE = "NUMBA_ATOMFLOW_HOME"


def home() -> Path:
    """The cache folder (not created here).

    Raises:
        OptionError: NUMBA_ATOMFLOW_HOME is not a usable path, or the user has no home folder.
    """
    setting = os.environ.get(ENVIRONMENT_VARIABLE)
    try:
        return Path(setting).expanduser() if setting else _platform_cache()
    except RuntimeError as error:
        what = (
            f"{ENVIRONMENT_VARIABLE} is {setting!r}, but no such user exists" if setting else "You have no home folder"
        )
        raise OptionError(f"{what}; set {ENVIRONMENT_VARIABLE} to a folder.") from error


def _platform_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "numba-atomflow"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "numba-atomflow"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba-atomflow"


def models() -> Path:
    """Folder of converted checkpoints: ``<home>/models/<name>.safetensors``."""
    return home() / "models"


def downloads() -> Path:
    """Folder of models downloaded from the hub: ``<home>/downloads/<organisation>--<name>@<commit>/``."""
    return home() / "downloads"


def compiled() -> Path:
    """Folder of numba's compiled code, one sub-folder per hash of ``ops/``."""
    return home() / "compiled"


def expand_user(path: str | Path) -> Path:
    """The path with ``~`` and ``~user`` replaced; ``~`` before an unknown user name stays, as in a shell."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's expanduser raises for an unknown user
