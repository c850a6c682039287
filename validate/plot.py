"""A picture of a validation: the error of each probe, and what is allowed. Needs the extra `plot` (matplotlib)."""

from pathlib import Path

from numba_atomflow.utils.plot import save_figure
from numba_atomflow.validate.report import Report


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
    save_figure(figure, path)
