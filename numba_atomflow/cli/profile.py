"""``numba-atomflow profile``: where the time of a decode step goes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.cli import measured, options, output
from numba_atomflow.cli.measured import Format
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
MB are what an op must move at least: weights, KV cache, activations; GB/s are those over its time.

\b
Where a token is made by the GPU's persistent kernel, its ops are timed by a trace of it: what each adds to the step.
--timeline draws that trace: waiting for what an op reads, waiting for weights, computing, waiting for the slowest
multiprocessor; and one layer, multiprocessor by multiprocessor. --json has the same sums as "trace".
"""


def profile(
    model: measured.Model = None,
    geometry: measured.Geometry = None,
    random_weights: measured.RandomWeights = False,
    depth: Annotated[int, typer.Option("--depth", "-d", metavar="N", help="Tokens that the KV cache holds.")] = 0,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", metavar="N", help="Runs; the faster half of them counts.")
    ] = 20,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="IMAGE", help="Draw every kernel against the ceiling.")
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline", metavar="IMAGE", help="Draw when each multiprocessor does what (persistent kernel)."
        ),
    ] = None,
    backend: options.Backend = options.BackendChoice.AUTO,
    decode: options.Decode = options.DecodeChoice.AUTO,
    threads: options.Threads = None,
    form: measured.Form = Format.TABLE,
    as_json: options.Json = False,
) -> None:
    """Time every op of a decode step, and the step as a whole, against what the memory of the device can do."""
    chosen = measured.Measured(model, geometry, random_weights)

    from numba_atomflow.perf import profile as profiler
    from numba_atomflow.utils.plot import check_plot

    profiler.check_profile(depth, repeats)
    for option, path in (("--plot", plot), ("--timeline", timeline)):
        if path is not None:
            check_plot(path, option)
    if depth >= chosen.geometry.max_positions:
        raise OptionError(f"--depth is {depth}; this model allows 0 to {chosen.geometry.max_positions - 1}.")
    with chosen.open(backend, depth + 1, threads, decode) as engine, output.steps_bar() as progress:
        if timeline is not None:
            profiler.check_timeline(engine)
        report = profiler.profile(engine, depth, repeats, progress)
    if plot is not None:
        profiler.plot(report, plot)
    if timeline is not None:
        profiler.plot_timeline(report, timeline)
    match Format.JSON if as_json else form:
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
        *measured.headline(report),
        f"a decode step behind {report.depth} tokens, the faster half of {report.repeats} runs",
    ]
    if report.trace is not None:
        lines.append(
            "all ops up to the vocabulary are parts of one kernel, timed by its trace, which slows it by some percent; "
            "the step as a whole is not traced"
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
        f"the step as a whole {report.step_seconds * 1e6:.1f} us: "
        f"a gap of {gap * 1e6:+.1f} us, {gap / report.step_seconds:+.1%} of the step\n"
    )
