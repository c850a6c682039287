"""How `bench` and `profile` print a report: its format, and the lines above its table."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.cli.option_groups import OptionGroup

if TYPE_CHECKING:
    from numba_atomflow.perf.bench import BenchReport
    from numba_atomflow.perf.profile import ProfileReport
    from numba_atomflow.perf.workload import WorkloadReport


class Format(StrEnum):
    """Values of --format."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"


@dataclass(frozen=True)
class ReportOptions(OptionGroup):
    """How a report is printed."""

    form: Annotated[Format, typer.Option("--format", "-f", help="Format of the report.")] = Format.TABLE
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False

    @property
    def format(self) -> Format:
        """--json goes before --format."""
        return Format.JSON if self.as_json else self.form


def headline(report: "BenchReport | ProfileReport") -> list[str]:
    """Model, device, machine, versions, commit and achievable bandwidth: a line each."""
    return [
        *origin(report),
        "achievable bandwidth, measured in this run: "
        + ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in report.ceilings.items()),
    ]


def origin(report: "BenchReport | ProfileReport | WorkloadReport") -> list[str]:
    """Model, device, machine, versions and commit: a line each."""
    machine = report.machine
    driver = machine["nvidia_driver"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return [
        f"model: {report.model}" + (", random weights" if report.random_weights else ""),
        f"device: {report.device}, {report.backend} backend",
        *([] if report.decode is None else [f"decode: {report.decode}"]),
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
        + (f", NVIDIA driver {driver} (CUDA {machine['cuda_driver']})" if driver else ""),
        f"versions: {versions}",
        f"commit: {machine['commit'] or 'installed package'}, {report.date}",
    ]
