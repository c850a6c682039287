"""A validation as a plot: each probe's relative error and its tolerance. Needs the extra `plot` (matplotlib)."""

from pathlib import Path

from numba_atomflow.utils.plot import plot_file
from numba_atomflow.validate.report import Report

_MOST_NAMES = 40  # of probes on the axis; of more, every n-th is named


def plot(report: Report, path: Path) -> None:
    """Draw the report's table into an image file.

    Raises:
        DestinationError: the file cannot be written.
    """
    probes = report.table or report.probes
    places = range(len(probes))
    failed = [i for i in places if not probes[i].passed]
    named = places[:: -(-len(probes) // _MOST_NAMES) or 1]
    with plot_file(path, 10, 6) as figure:
        axes = figure.subplots()
        axes.semilogy(places, [probe.tolerance for probe in probes], "--", color="tab:gray", label="tolerance")
        axes.semilogy(places, [probe.worst_row_l2 for probe in probes], ".-", color="tab:blue", label="error")
        if failed:
            errors = [probes[i].worst_row_l2 for i in failed]
            axes.semilogy(failed, errors, "o", color="tab:red", label="error above tolerance")
        axes.set_xticks(list(named), [probes[i].name for i in named], rotation=90)
        axes.set_xlabel("probe, in the order of the step" + ", each layer fed the reference's input" * report.isolated)
        axes.set_ylabel("relative L2 error, worst position")
        axes.grid(axis="y", color="0.9")
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        figure.suptitle(f"{report.backend} against {report.reference}")
