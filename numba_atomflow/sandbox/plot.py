"""Pictures of a served workload and of a comparison. Need the extra `plot` (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from numba_atomflow.sandbox.compare import Comparison
from numba_atomflow.sandbox.engine import StepRecord
from numba_atomflow.utils.plot import save_figure


def plot_run(steps: Sequence[StepRecord], blocks: int, path: Path) -> None:
    """Requests, blocks in use, and tokens per second, over the server's clock.

    Raises:
        DestinationError: the file cannot be written.
    """
    figure, (upper, middle, lower) = _figure(3)
    times = [step.now for step in steps]
    upper.step(times, [step.running for step in steps], where="post", label="running")
    upper.step(times, [step.waiting for step in steps], where="post", label="waiting")
    upper.set_ylabel("requests")
    upper.legend(fontsize=8)
    middle.step(times, [100 * step.used_blocks / blocks for step in steps], where="post", color="tab:green")
    middle.set_ylabel("blocks in use, %")
    seconds = [step.schedule_seconds + step.table_seconds + step.model_seconds for step in steps]
    speeds = [step.tokens / took for step, took in zip(steps, seconds, strict=True)]
    lower.plot(times, speeds, ".", color="tab:purple")
    lower.set_ylabel("tokens / s")
    lower.set_xlabel("seconds of the server's clock")
    save_figure(figure, path)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Latency of attention by context, and of the whole step by batch, static and paged.

    Raises:
        DestinationError: the file cannot be written.
    """
    figure, (left, right) = _figure(2)
    contexts = sorted({row.context for row in comparison.attention})
    static = [median(r.static_seconds for r in comparison.attention if r.context == context) for context in contexts]
    left.plot(contexts, [seconds * 1e6 for seconds in static], "k.-", label="static")
    for size in sorted({row.block_size for row in comparison.attention}):
        rows = sorted((r for r in comparison.attention if r.block_size == size), key=lambda r: r.context)
        left.plot([r.context for r in rows], [r.paged_seconds * 1e6 for r in rows], ".--", label=f"blocks of {size}")
    left.set_xscale("log", base=2)
    left.set_xlabel("context")
    left.set_ylabel("attention of one layer, us")
    left.legend(fontsize=8)
    for (size, context), steps in comparison.steps_by_kind().items():
        batches = [step.batch for step in steps]
        line = right.plot(batches, [s.paged_seconds * 1e3 for s in steps], ".--", label=f"{size} at {context}")[0]
        right.plot(batches, [s.static_seconds * 1e3 for s in steps], "-", color=line.get_color(), alpha=0.5)
    right.set_xlabel("batch")
    right.set_ylabel("whole step, ms (solid: static)")
    right.legend(fontsize=8)
    figure.suptitle(f"{comparison.model}, {comparison.device}", fontsize=9)
    save_figure(figure, path)


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.4 * panels + 0.6), layout="constrained")
    return figure, figure.subplots(panels, 1)
