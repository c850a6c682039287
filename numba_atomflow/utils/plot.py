"""Plots as image files. Needs the extra `plot` (matplotlib)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numba_atomflow.errors import DestinationError, OptionError
from numba_atomflow.files.atomic import write_whole

_DPI = 150
# Legible at half size, on a page of text: letters are at least 8 pixels high there.
_STYLE: Any = {
    "font.size": 12,
    "axes.labelsize": 12,
    "axes.titlesize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


def check_plot(path: Path, option: str = "--plot") -> None:
    """Refuse a path before the work is done, not after; `option` is where the path comes from.

    Raises:
        OptionError: matplotlib is not installed, or the suffix is no image format of it.
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


@contextmanager
def plot_file(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of `width` by `height` inches to draw into; its file appears complete or not at all.

    Raises:
        DestinationError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        image = io.BytesIO()
        figure.savefig(image, dpi=_DPI, format=path.suffix.lstrip("."))
    try:
        write_whole(path, image.getvalue(), replace=True)
    except OSError as error:
        raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
