"""Plots of a served workload and of a comparison. They need the extra `plot` (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from numba_atomflow.sandbox.compare import Comparison
from numba_atomflow.sandbox.engine import StepRecord
from numba_atomflow.utils.plot import plot_file


def plot_run(steps: Sequence[StepRecord], blocks: int, path: Path) -> None:
    """Requests, KV blocks in use, and throughput of each step, over the engine's clock.

    Raises:
        DestinationError: the file cannot be written.
    """
    times = [step.now for step in steps]
    seconds = [step.schedule_seconds + step.table_seconds + step.model_seconds for step in steps]
    with plot_file(path, 9, 9) as figure:
        requests, cache, speed = figure.subplots(3, 1, sharex=True)
        requests.step(times, [step.running for step in steps], where="post", label="running")
        requests.step(times, [step.waiting for step in steps], where="post", label="waiting")
        requests.set_ylabel("requests")
        requests.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        shares = [100 * step.used_blocks / blocks for step in steps]
        cache.step(times, shares, where="post", color="tab:green")
        cache.set_ylabel(f"KV blocks in use,\n% of {blocks}")
        speeds = [step.generated_tokens / took for step, took in zip(steps, seconds, strict=True)]
        speed.plot(times, speeds, ".", color="tab:purple")
        speed.set_ylabel("throughput of a step,\ngenerated tokens/s")
        speed.set_xlabel("time on the engine's clock, s")
        for axes in (requests, cache, speed):
            axes.grid(color="0.9")
        for axes in (cache, speed):
            axes.set_ylim(bottom=0)


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Latency of attention by context length, and of the whole step by batch size, with static and with paged KV.

    Raises:
        DestinationError: the file cannot be written.
    """
    contexts = sorted({row.context for row in comparison.attention})
    static = [median(r.static_seconds for r in comparison.attention if r.context == context) for context in contexts]
    with plot_file(path, 9, 9) as figure:
        attention, step_time = figure.subplots(2, 1)
        sizes = sorted({row.block_size for row in comparison.attention})
        colors = {size: f"C{i}" for i, size in enumerate(sizes)}
        attention.plot(contexts, [seconds * 1e6 for seconds in static], "k.-", label="static KV")
        for size, color in colors.items():
            rows = sorted((r for r in comparison.attention if r.block_size == size), key=lambda r: r.context)
            seconds = [r.paged_seconds * 1e6 for r in rows]
            attention.plot([r.context for r in rows], seconds, ".--", color=color, label=f"paged, blocks of {size}")
        attention.set_xscale("log", base=2)
        attention.set_xticks(contexts, [str(context) for context in contexts])
        attention.set_xlabel("context length, tokens")
        attention.set_ylabel("attention of one layer,\none token, µs")
        for (size, context), steps in comparison.steps_by_kind().items():
            batches, static = [step.batch for step in steps], [step.static_seconds * 1e3 for step in steps]
            step_time.plot(batches, static, "k.-", label="static KV")
            paged = [step.paged_seconds * 1e3 for step in steps]
            step_time.plot(batches, paged, ".--", color=colors[size], label=f"paged, blocks of {size}")
            if size == sizes[0]:
                step_time.annotate(f" context {context}", (batches[-1], static[-1]), va="top")
        step_time.set_xticks(sorted({step.batch for step in comparison.steps}))
        step_time.set_xlabel("batch size, sequences per step")
        step_time.set_ylabel("decode step on the device, ms")
        step_time.margins(x=0.15)
        for axes in (attention, step_time):
            axes.grid(color="0.9")
        handles, labels = attention.get_legend_handles_labels()
        figure.legend(handles, labels, ncols=3, loc="outside lower center", frameon=False)
        figure.suptitle(f"{comparison.model}, {comparison.device}")
