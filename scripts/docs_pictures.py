"""Draw the pictures of the documents anew, in one run on a GPU: roofline, timeline, and the README's layer of a step.

    python scripts/docs_pictures.py                                 # Llama 3.2 3B with random weights, into docs/
    python scripts/docs_pictures.py --geometry llama-3.1-8b --out /tmp

Needs the extra `plot` (matplotlib) and a GPU that runs the persistent kernel. Prints the table that belongs to the
roofline, for docs/benchmarks.md. The sandbox's picture is `numba-atomflow sandbox compare --plot`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from numba_atomflow import AtomFlowError, Engine
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.errors import OptionError
from numba_atomflow.model.presets import find_preset
from numba_atomflow.perf.profile import check_timeline, plot, plot_timeline, profile
from numba_atomflow.utils.plot import save_figure

SMS = 44  # rows of the README's picture; more would be too small to read
COLOURS = {"qkv": "#7e57c2", "attention": "#2e9e3f", "o": "#8d5a3b", "gate_up": "#12a5c4", "down": "#dd6fb4"}


def draw_layer(trace: StepTrace, path: Path, sms: int = SMS) -> None:
    """One layer in the middle of the model, a row for each of the first `sms` SMs.

    Dark: computing. Light: waiting for the result of the op before. Thin: the op's weights are copied.

    Raises:
        DestinationError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    layers = len({name.split(".")[1] for name in trace.names if name.startswith("layer.")})
    middle = f"layer.{layers // 2}."
    ops = [op for op, name in enumerate(trace.names) if name.startswith(middle)]
    zero = trace.ends[ops[0] - 1]
    rows = np.arange(min(sms, len(trace.done)))
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes: Any = figure.subplots()
    handles = []
    for op in ops:
        kind = trace.names[op].removeprefix(middle)
        begun, staged, done, first, last = (
            (times[: len(rows), op] - zero) / 1e3
            for times in (trace.begun, trace.staged, trace.done, trace.copy_begun, trace.copy_done)
        )
        colour = COLOURS[kind]
        busy, copied = ~np.isnan(staged), ~np.isnan(first)
        axes.barh(rows[busy], (staged - begun)[busy], 0.62, begun[busy], color=colour, alpha=0.28)
        axes.barh(rows[busy], (done - staged)[busy], 0.62, staged[busy], color=colour)
        axes.hlines(rows[copied] + 0.5, first[copied], last[copied], color=colour, lw=0.9)
        handles.append(Patch(color=colour, label=kind))
    handles += [
        Patch(color="#444444", label="computes"),
        Patch(color="#444444", alpha=0.28, label="waits for its input"),
        Line2D([], [], color="#444444", lw=1.2, label="weights are copied"),
    ]
    start = min(np.nanmin(trace.begun[: len(rows), ops[0]]), zero) - zero
    axes.set_xlim(start / 1e3, (trace.ends[ops[-1]] - zero) / 1e3 * 1.005)
    axes.set_ylim(len(rows), -1)
    axes.set_xlabel("microseconds since the layer began", fontsize=14)
    axes.set_ylabel("SM", fontsize=14)
    axes.tick_params(labelsize=13)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        fontsize=13,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.1,
        handletextpad=0.5,
    )
    save_figure(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-3.2-3b", help="a preset (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs", help="a folder")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    try:
        geometry = find_preset(args.geometry)
        with Engine.random(geometry, backend="cuda", decode="persistent", name=args.geometry) as engine:
            check_timeline(engine)
            report = profile(engine, repeats=args.repeats)
        size = args.geometry.rsplit("-", 1)[-1]
        plot(report, args.out / f"roofline-{size}.svg")
        plot_timeline(report, args.out / f"persistent-{size}.png")
        if report.trace is None:
            raise OptionError("The step was not traced: no timeline.")
        draw_layer(report.trace, args.out / "decode-step.png")
    except AtomFlowError as error:
        print(f"docs_pictures: {error}", file=sys.stderr)
        return 2
    best = report.ceiling[1]
    print(f"{report.device}; step {report.step_seconds * 1e6:.0f} us, ops {report.ops_seconds * 1e6:.0f} us\n")
    print("| op | share of time | per token | mean us | us per token | MB each | GB/s | of the bandwidth |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in report.kernels:
        share, speed = row.seconds / report.ops_seconds, row.gigabytes_per_second
        print(
            f"| {row.kind} | {share:.1%} | {row.count} | {row.mean_seconds * 1e6:.1f} | {row.seconds * 1e6:.1f} "
            f"| {row.moved_bytes / row.count / 1e6:.3f} | {speed:.0f} | {speed / best:.0%} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
