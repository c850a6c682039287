"""``numba-atomflow profile``: the time of every op of a decode step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.cli import options, output
from numba_atomflow.cli.model_choice import ModelChoice
from numba_atomflow.cli.report import Format, ReportOptions, headline
from numba_atomflow.errors import OptionError
from numba_atomflow.utils.tables import Style, render

if TYPE_CHECKING:
    from numba_atomflow.perf.profile import ProfileReport

EXAMPLES = """\b
Examples:
  numba-atomflow profile                                        the default model
  numba-atomflow profile my-model.safetensors --depth 2048
  numba-atomflow profile --geometry llama-3.2-3b --random-weights --plot roofline.svg
  numba-atomflow profile --decode persistent --timeline timeline.svg
  numba-atomflow profile --json | jq '.kernels[0]'

\b
MB: an op's compulsory traffic (weights, KV cache, activations). GB/s: the same over its time.

\b
Ops of the persistent kernel are timed by a trace of that kernel: what each adds to the step. --timeline draws the
trace: per kind of op, the time spent waiting for activations, waiting for weights, computing, and waiting for the
slowest SM; and one layer, SM by SM. --json has the same sums as "trace".
"""


def profile(
    *,
    model: ModelChoice,
    depth: Annotated[int, typer.Option("--depth", "-d", metavar="N", help="Tokens in the KV cache.")] = 0,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", metavar="N", help="Runs, of which the faster half counts.")
    ] = 20,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="IMAGE", help="Draw every kernel's time and bandwidth.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option("--timeline", metavar="IMAGE", help="Draw the persistent kernel's trace, SM by SM."),
    ] = None,
    engine_options: options.EngineOptions,
    report_options: ReportOptions,
) -> None:
    """Time every op of a decode step.

    Also the whole step, and the share of achievable memory bandwidth.
    """
    chosen_model = model.find()

    from numba_atomflow.perf import profile as profiler
    from numba_atomflow.utils.plot import check_plot

    profiler.check_profile(depth, repeats)
    for option, path in (("--plot", plot), ("--timeline", timeline)):
        if path is not None:
            check_plot(path, option)
    if depth >= chosen_model.geometry.max_positions:
        raise OptionError(f"--depth is {depth}; this model allows 0 to {chosen_model.geometry.max_positions - 1}.")
    positions = min(depth + profiler.MOST_POSITIONS, chosen_model.geometry.max_positions)
    with chosen_model.open(engine_options, positions) as engine, output.steps_bar() as progress:
        if timeline is not None:
            profiler.check_timeline(engine)
        report = profiler.profile(engine, depth, repeats, progress)
    if plot is not None:
        profiler.plot(report, plot)
    if timeline is not None:
        profiler.plot_timeline(report, timeline)
    match report_options.format:
        case Format.JSON:
            output.emit_json(report.to_dict())
        case Format.CSV:
            output.emit(_table(report, "csv"))
        case Format.MD:
            output.emit("".join(f"- {line}\n" for line in _headline(report)) + "\n" + _table(report, "md"))
            output.emit("\n" + _sums(report))
        case Format.TABLE:
            output.emit("".join(f"{line}\n" for line in _headline(report)) + "\n" + _table(report, "table"))
            output.emit("\n" + _sums(report))


def _headline(report: "ProfileReport") -> list[str]:
    lines = [
        *headline(report),
        f"a decode step after {report.depth} tokens, mean of the faster half of {report.repeats} runs",
    ]
    if report.trace is not None:
        lines.append(
            "all ops up to the LM head are parts of one kernel, timed by its trace, which slows it by some percent; "
            "the whole step is timed without the trace"
        )
    return lines


def _table(report: "ProfileReport", style: Style) -> str:
    name, ceiling = report.ceiling
    headers = ["kernel", "share", "per token", "mean us", "us per token", "MB each", "GB/s", f"of {name}"]
    rows = [
        [
            row.kind,
            f"{row.seconds / report.ops_seconds:.1%}",
            str(row.count),
            f"{row.mean_seconds * 1e6:.1f}",
            f"{row.seconds * 1e6:.1f}",
            f"{row.moved_bytes / row.count / 1e6:.3f}",
            f"{row.gigabytes_per_second:.1f}",
            f"{row.gigabytes_per_second / ceiling:.0%}",
        ]
        for row in report.kernels
    ]
    return render(style, headers, rows)


def _sums(report: "ProfileReport") -> str:
    gap = report.gap_seconds
    return (
        f"ops {report.ops_measured} {report.ops_seconds * 1e6:.1f} us, "
        f"the whole step {report.step_seconds * 1e6:.1f} us: "
        f"a gap of {gap * 1e6:+.1f} us, {gap / report.step_seconds:+.1%} of the step\n"
    )
