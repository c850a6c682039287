"""Draw the figures of the documents, in one run on a GPU: roofline, timeline, and the README's layer of a step.

    python scripts/docs_pictures.py                                 # Llama 3.2 3B with random weights, into docs/
    python scripts/docs_pictures.py --geometry llama-3.1-8b --out /tmp

Needs the extra `plot` (matplotlib) and a GPU that runs the persistent kernel. Prints the table that belongs to the
roofline, for docs/benchmarks.md. The sandbox's picture is `numba-atomflow sandbox compare --plot`.
"""

import argparse
import sys
from pathlib import Path

from number_lists import at_least

from numba_atomflow import AtomFlowError, Engine
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.errors import OptionError
from numba_atomflow.model.presets import find_preset
from numba_atomflow.perf.profile import check_timeline, plot, plot_timeline, profile
from numba_atomflow.perf.timeline import draw_layer
from numba_atomflow.utils.plot import plot_file

SMS = 44  # rows of the README's picture; more would be too small to read


def draw_readme_picture(trace: StepTrace, path: Path) -> None:
    """One layer of a step on the first SMs, low enough for the first screen of a page.

    Raises:
        DestinationError: the file cannot be written.
    """
    with plot_file(path, 10, 4.6) as figure:
        draw_layer(figure.subplots(), trace, SMS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="llama-3.2-3b", help="a preset (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs", help="a folder")
    parser.add_argument("--repeats", type=at_least(1), default=20)
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
        draw_readme_picture(report.trace, args.out / "decode-step.png")
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
