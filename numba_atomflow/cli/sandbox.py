"""``numba-atomflow sandbox run | compare``: serve many requests over a paged KV cache, and measure what that costs."""

from pathlib import Path
from typing import Annotated

import typer

from numba_atomflow.cli import options, output, sandbox_report
from numba_atomflow.cli.model_choice import ModelChoice
from numba_atomflow.cli.sandbox_options import (
    CacheOptions,
    DeviceOptions,
    WorkloadOptions,
    contexts_of,
    numbers_of,
    open_weights,
)
from numba_atomflow.errors import OptionError
from numba_atomflow.host.machine import machine_record

RUN_EXAMPLES = """\b
Examples:
  numba-atomflow sandbox run --poisson 4 --requests 16
  numba-atomflow sandbox run --trace requests.jsonl --block-size 32 --json
  numba-atomflow sandbox run --poisson 20 --requests 64 --blocks 40 --plot run.png
  numba-atomflow sandbox run --geometry llama-3.2-3b --random-weights --poisson 50 --requests 100 --prompt-tokens 256

\b
A trace has a JSON object per line:
  {"arrival": 0.0, "prompt": "Once upon a time", "max_tokens": 32}
  {"fork_of": 1, "after": 10, "prompt": " But then", "max_tokens": 32}
"""

COMPARE_EXAMPLES = """\b
Examples:
  numba-atomflow sandbox compare
  numba-atomflow sandbox compare --geometry llama-3.2-3b --random-weights --json > comparison.json
  numba-atomflow sandbox compare --contexts 128,1024 --block-sizes 16,64 --batches 1,8 --plot comparison.png

\b
Static and paged KV are measured in one run, on the same data. docs/paging.md has the method.
"""

_CONTEXTS, _STEP_CONTEXTS = "128,512,1024,2048,4096,8192,16384", "128,1024,4096"
_STEP_MARGIN = 64  # positions that whole steps add to their context, at most

Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="IMAGE", help="Draw a plot (needs matplotlib).", show_default=False)
]


def run(
    *,
    model: ModelChoice,
    workload: WorkloadOptions,
    cache: CacheOptions,
    device: DeviceOptions,
    plot: Plot = None,
    as_json: options.Json = False,
) -> None:
    """Serve requests as they arrive, and report throughput and latency.

    Continuous batching over a paged KV cache, with real tokens; decoding is greedy.
    """
    workload.check()
    _check_plot(plot)

    from numba_atomflow.sandbox.engine import ServingEngine
    from numba_atomflow.sandbox.report import report_of

    with open_weights(model) as weights:
        requests = workload.make(weights)
        with device.runner(weights, cache.sizes(weights.geometry)) as runner:
            engine = ServingEngine(runner, cache.token_budget, cache.running_limit(runner.max_batched_tokens))
            with output.steps_bar("requests") as progress:
                served = engine.serve(requests.requests, requests.forks, progress)
            report, device_name = report_of(engine, served), runner.device
    if plot is not None:
        from numba_atomflow.sandbox.plot import plot_run

        plot_run(engine.steps, engine.manager.block_count, plot)
    if as_json:
        record = {"model": str(weights.path), "device": device_name, "machine": machine_record(), **report.to_dict()}
        output.emit_json(record | {"replies": [sandbox_report.request_record(request) for request in served]})
    else:
        output.emit(sandbox_report.run_table(report, str(weights.path), device_name))


def compare(
    *,
    model: ModelChoice,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            metavar="A,B,...",
            help="Context lengths of the attention kernels.  [default: 128 to 16384, or what the model allows]",
            show_default=False,
        ),
    ] = None,
    step_contexts: Annotated[
        str | None,
        typer.Option(
            "--step-contexts",
            metavar="A,B,...",
            help="Context lengths of whole steps.  [default: 128,1024,4096]",
            show_default=False,
        ),
    ] = None,
    block_sizes: Annotated[
        str, typer.Option("--block-sizes", metavar="A,B,...", help="Positions per KV block.")
    ] = "8,16,32,64,128",
    batches: Annotated[
        str, typer.Option("--batches", metavar="A,B,...", help="Sequences per step, 1 to 8.")
    ] = "1,2,4,8",
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", help="Runs per median.")] = 20,
    device: DeviceOptions,
    plot: Plot = None,
    as_json: options.Json = False,
) -> None:
    """Measure what paging and batching cost a decode step.

    Attention and whole steps with paged and with static KV, and a breakdown of the time per step.
    """
    sizes, batch_sizes = numbers_of("--block-sizes", block_sizes), numbers_of("--batches", batches)
    if repeats < 1 or max(batch_sizes) > 8:
        raise OptionError("--repeats must be 1 or more, and --batches 1 to 8; correct them.")
    _check_plot(plot)

    from numba_atomflow.sandbox.compare import Grid, blocks_needed
    from numba_atomflow.sandbox.compare import compare as measure
    from numba_atomflow.sandbox.runner import cache_sizes

    with open_weights(model) as weights:
        limit = weights.geometry.max_positions
        grid = Grid(
            contexts_of("--contexts", contexts, _CONTEXTS, limit),
            contexts_of("--step-contexts", step_contexts, _STEP_CONTEXTS, limit - _STEP_MARGIN),
            batch_sizes,
            repeats,
        )
        largest = max(sizes)
        blocks = blocks_needed(grid, largest) * largest // sizes[0]
        cache = cache_sizes(weights.geometry, blocks, sizes, max(batch_sizes), grid.longest)
        with device.runner(weights, cache) as runner, output.steps_bar() as progress:
            comparison = measure(runner, str(weights.path), grid, progress)
    if plot is not None:
        from numba_atomflow.sandbox.plot import plot_comparison

        plot_comparison(comparison, plot)
    if as_json:
        output.emit_json({"machine": machine_record(), **comparison.to_dict()})
    else:
        output.emit(sandbox_report.comparison_tables(comparison))


def _check_plot(path: Path | None) -> None:
    if path is not None:
        from numba_atomflow.utils.plot import check_plot

        check_plot(path)
