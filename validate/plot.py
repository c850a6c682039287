"""A picture of a validation: the error of each probe, and what is allowed. Needs the extra `plot` (matplotlib)."""

from importlib.util import find_spec
from pathlib import Path

from numba_atomflow.errors import DestinationError, OptionError
from numba_atomflow.validate.report import Report


def check_plot(path: Path) -> None:
    """Complain before the work is done, not after.

    Raises:
        OptionError: matplotlib is not installed, or the name's ending is no format of it.
        DestinationError: the folder does not exist.
    """
    if find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib, which is not installed; run pip install 'numba-atomflow[plot]'.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise OptionError(f"--plot {path} has no ending that names a picture's format; use {path.stem}.png.")
    if not path.parent.is_dir():
        raise DestinationError(f"There is no folder {path.parent} for the plot; make it first.")


def plot(report: Report, path: Path) -> None:
    """Draw the report's table into an image file.

    Raises:
        DestinationError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    probes = report.table or report.probes
    places = range(len(probes))
    figure = Figure(figsize=(max(6.0, 0.25 * len(probes)), 4.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(places, [probe.tolerance for probe in probes], "--", color="gray", label="allowed")
    axes.semilogy(places, [probe.worst_row_l2 for probe in probes], ".-", color="tab:blue", label="found")
    failed = [i for i in places if not probes[i].passed]
    if failed:
        axes.semilogy(failed, [probes[i].worst_row_l2 for i in failed], "o", color="tab:red", label="failed")
    axes.set_xticks(list(places), [probe.name for probe in probes], rotation=90, fontsize=7)
    axes.set_ylabel("relative L2 of the worst position")
    axes.set_title(
        f"{report.backend}\nagainst {report.reference}" + (", layers isolated" * report.isolated), fontsize=9
    )
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
