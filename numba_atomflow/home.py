"""Where this project keeps what it makes: checkpoints and compiled code, under one folder.

``NUMBA_ATOMFLOW_HOME`` names the folder; without it, the platform's cache folder is used.
"""

import os
import sys
from pathlib import Path

ENVIRONMENT_VARIABLE = "NUMBA_ATOMFLOW_HOME"


def home() -> Path:
    """The cache folder (not created here)."""
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "numba-atomflow"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "numba-atomflow"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba-atomflow"


def models() -> Path:
    """Folder of converted checkpoints: ``<home>/models/<name>.safetensors``."""
    return home() / "models"


def compiled() -> Path:
    """Folder of numba's compiled code, one sub-folder per hash of ``ops/``."""
    return home() / "compiled"
