"""Pictures as files. Needs the extra `plot` (matplotlib)."""

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numba_atomflow.errors import DestinationError, OptionError


def check_plot(path: Path, option: str = "--plot") -> None:
    """Complain before the work is done, not after; `option` is where the path comes from.

    Raises:
        OptionError: matplotlib is not installed, or the name's ending is no format of it.
        DestinationError: the folder does not exist.
    """
    if find_spec("matplotlib") is None:
        raise OptionError(f"{option} needs matplotlib, which is not installed; run pip install 'numba-atomflow[plot]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise OptionError(f"{option} {path} has no ending that names a picture's format; use {path.stem}.png.")
    if not path.parent.is_dir():
        raise DestinationError(f"There is no folder {path.parent} for the plot; make it first.")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure; it appears under its name complete or not at all.

    Raises:
        DestinationError: the file cannot be written.
    """
    partial = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        figure.savefig(partial, dpi=150)
        partial.replace(path)
    except OSError as error:
        raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
