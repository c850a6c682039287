"""Files to which ``validate`` writes its result: a plot, JUnit XML, an HTML page."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from numba_atomflow.errors import DestinationError

if TYPE_CHECKING:
    from numba_atomflow.validate import ReplayReport, Report


class ReportFiles(NamedTuple):
    """Where the result goes besides standard output; None: nowhere."""

    plot: Path | None
    junit: Path | None
    html: Path | None

    def check(self) -> None:
        """Refuse a path before the work is done, not after.

        Raises:
            DestinationError: a folder does not exist, or a path is one.
            OptionError: no plot can be drawn.
        """
        from numba_atomflow.utils.plot import check_plot

        if self.plot is not None:
            check_plot(self.plot)
        for option, path in (("--junit", self.junit), ("--html", self.html)):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise DestinationError(
                    f"{option} {path} cannot be written; give the name of a file in a folder that exists."
                )

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
