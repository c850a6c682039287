"""How `bench --workload` prints its report."""

from typing import TYPE_CHECKING

from numba_atomflow.cli import output
from numba_atomflow.cli.report import Format, origin
from numba_atomflow.utils.tables import render

if TYPE_CHECKING:
    from numba_atomflow.perf.workload import PromptResult, WorkloadReport


def _headers(report: "WorkloadReport") -> list[str]:
    speeds = ["off tok/s", f"{report.speculation} tok/s"]
    return ["prompt", "tokens", *speeds, "ratio", "steps", "proposed", "accepted", "tokens per step"]


def show(report: "WorkloadReport", form: Format) -> None:
    """Print a report."""
    if form is Format.JSON:
        output.emit_json(report.to_dict())
        return
    if form is Format.CSV:
        numbers = [_numbers(str(number), result) for number, result in enumerate(report.results, 1)]
        output.emit(render("csv", _headers(report), numbers))
        return
    bullet = "- " if form is Format.MD else ""
    lines = [
        *origin(report),
        f"workload: {report.workload}, {report.decode_tokens} tokens at most, {report.repeats} turns of each kind",
        f"speculation: {_speculation(report)}",
    ]
    rows = [_row(str(number), result) for number, result in enumerate(report.results, 1)]
    rows.append(_row("all", report.total))
    table = render("md" if form is Format.MD else "table", _headers(report), rows)
    output.emit("".join(f"{bullet}{line}\n" for line in lines) + "\n" + table)


def _speculation(report: "WorkloadReport") -> str:
    if report.obstacle:
        return f"off, because {report.obstacle}"
    return report.speculation if report.draft is None else f"draft, by {report.draft}"


def _numbers(name: str, result: "PromptResult") -> list[str]:
    """A row of CSV: medians in full."""
    values = (
        result.tokens,
        result.plain_speed.median,
        result.speculative_speed.median,
        result.ratio,
        result.steps,
        result.proposed,
        result.accepted,
        result.mean_accepted_length,
    )
    return [name, *map(str, values)]


def _row(name: str, result: "PromptResult") -> list[str]:
    return [
        name,
        str(result.tokens),
        result.plain_speed.text(1),
        result.speculative_speed.text(1),
        f"{result.ratio:.2f}",
        f"{result.steps:.0f}",
        f"{result.proposed:.0f}",
        f"{result.accepted:.0f}",
        f"{result.mean_accepted_length:.2f}",
    ]
