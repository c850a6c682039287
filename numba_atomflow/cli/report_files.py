"""Files to which ``validate`` writes its result: a plot, JUnit XML, an HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from numba_atomflow.errors import DestinationError, OptionError
from numba_atomflow.files.destination import check_destination_in_folder

if TYPE_CHECKING:
    from numba_atomflow.validate import ReplayReport, Report


_MARK = b"numba-atomflow validate"  # at the beginning of both kinds of reports


class ReportFiles(NamedTuple):
    """Where the result goes besides standard output; None: nowhere."""

    plot: Path | None
    junit: Path | None
    html: Path | None

    def check(self) -> None:
        """Refuse a path before the work is done, not after.

        Raises:
            DestinationError: a folder does not exist, or there can be no file of that name, or a report would replace
                something else than a report.
            OptionError: no plot can be drawn, or two options name the same file.
        """
        from numba_atomflow.utils.plot import check_plot

        if self.plot is not None:
            check_plot(self.plot)
        paths = [path for path in self if path is not None]
        for path in paths:
            check_destination_in_folder(path, overwrite=True)
        for report in (self.junit, self.html):
            if report is not None and report.exists() and not _is_report(report):
                raise DestinationError(f"{report} exists and is no report of `validate`; choose another name.")
        if len({path.resolve() for path in paths}) < len(paths):
            raise OptionError("--plot, --junit and --html write a file each; give them different names.")

    def write(self, report: "Report | ReplayReport", title: str) -> None:
        """Write what was asked for; each file appears complete or not at all.

        Raises:
            DestinationError: a file cannot be written.
        """
        from numba_atomflow.files.atomic import write_whole
        from numba_atomflow.validate import Report, html_page, junit_xml
        from numba_atomflow.validate.plot import plot

        if self.plot is not None and isinstance(report, Report):
            plot(report, self.plot)
        for path, make in ((self.junit, junit_xml), (self.html, html_page)):
            if path is None:
                continue
            try:
                write_whole(path, make(report, title), replace=True)
            except OSError as error:
                raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error


def _is_report(path: Path) -> bool:
    """Whether a file may be replaced by a report: it is one, or empty."""
    try:
        with path.open("rb") as file:
            beginning = file.read(1024)
    except OSError as error:
        raise DestinationError(f"{path} cannot be written ({error.strerror}); choose another name.") from error
    return not beginning or _MARK in beginning
