"""``numba-atomflow sandbox run | compare``: many requests over one model, and what paging and batching cost."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.cli import measured, options, output
from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.host.machine import machine_record
from numba_atomflow.utils.tables import render

if TYPE_CHECKING:
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.checkpoint.random_weights import RandomModel
    from numba_atomflow.sandbox.arrivals import Workload
    from numba_atomflow.sandbox.compare import Comparison
    from numba_atomflow.sandbox.report import Percentiles, ServingReport
    from numba_atomflow.sandbox.requests import Request
    from numba_atomflow.sandbox.runner import CacheSizes, Runner

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
Static and paged are measured in one run, on the same data. docs/paging.md has the method.
"""

PROMPTS = (
    "You are a helpful assistant. Answer in one sentence. What is the capital of France?",
    "You are a helpful assistant. Answer in one sentence. Why is the sky blue?",
    "You are a helpful assistant. Answer in one sentence. Name three rivers.",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "The three most important inventions of the twentieth century were",
    "Water boils at a temperature that depends on",
    "You are a helpful assistant. Answer in one sentence. What is a page table?",
)

Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw a picture (needs matplotlib).", show_default=False)
]


def run(
    model: measured.Model = None,
    geometry: measured.Geometry = None,
    random_weights: measured.RandomWeights = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Requests to serve.", show_default=False)
    ] = None,
    poisson: Annotated[
        float | None,
        typer.Option("--poisson", metavar="RATE", help="Arrivals at random, so many per second.", show_default=False),
    ] = None,
    requests: Annotated[int, typer.Option("--requests", metavar="N", help="Of --poisson.")] = 16,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens", metavar="N", help="Random prompts of N tokens, not of words.", show_default=False
        ),
    ] = None,
    common_tokens: Annotated[
        int, typer.Option("--common-tokens", metavar="N", help="Of them, at the beginning of every prompt.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens of a reply.")] = 32,
    ignore_eos: options.IgnoreEos = False,
    blocks: Annotated[int, typer.Option("--blocks", metavar="N", help="Of the KV cache.")] = 256,
    block_size: Annotated[int, typer.Option("--block-size", metavar="N", help="Positions of a block.")] = 16,
    max_sequences: Annotated[int, typer.Option("--max-sequences", metavar="N", help="Requests that run at once.")] = 8,
    token_budget: Annotated[
        int | None,
        typer.Option("--token-budget", metavar="N", help="Tokens of a step.  [default: as many as the device takes]"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of arrivals and random prompts.")] = 0,
    plot: Plot = None,
    backend: options.Backend = options.BackendChoice.AUTO,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Serve requests as they arrive, and report what it cost.

    Continuous batching over a paged KV cache, with real tokens; replies are greedy.
    """
    if (trace is None) == (poisson is None):
        raise OptionError("There are no arrivals; give either --trace FILE or --poisson RATE.")
    _check_plot(plot)

    from numba_atomflow.sandbox.engine import ServingEngine
    from numba_atomflow.sandbox.report import report_of
    from numba_atomflow.sandbox.runner import cache_sizes

    with _opened(model, geometry, random_weights) as weights:
        encode, end_tokens = _tokenizer(weights, ignore_eos)
        work = _workload(
            trace, poisson, requests, prompt_tokens, common_tokens, max_tokens, seed, encode, end_tokens, weights
        )
        sizes = cache_sizes(weights.geometry, blocks, (block_size,), max_sequences)
        with _runner(weights, backend, sizes, threads) as runner:
            server = ServingEngine(runner, token_budget, min(max_sequences, token_budget or runner.max_batched_tokens))
            with output.steps_bar("requests") as progress:
                served = server.serve(work.requests, work.forks, progress)
            report = report_of(server, served)
            device = runner.device
    if plot is not None:
        from numba_atomflow.sandbox.plot import plot_run

        plot_run(server.steps, server.manager.block_count, plot)
    if as_json:
        record = {"model": str(weights.path), "device": device, "machine": machine_record(), **report.to_dict()}
        output.emit_json(record | {"replies": [_reply(request) for request in served]})
    else:
        output.emit(_run_table(report, str(weights.path), device))


def compare(
    model: measured.Model = None,
    geometry: measured.Geometry = None,
    random_weights: measured.RandomWeights = False,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            metavar="A,B,...",
            help="Of the attention kernels.  [default: 128 to 16384, or what the model allows]",
            show_default=False,
        ),
    ] = None,
    step_contexts: Annotated[
        str | None,
        typer.Option(
            "--step-contexts", metavar="A,B,...", help="Of whole steps.  [default: 128, 1024, 4096]", show_default=False
        ),
    ] = None,
    block_sizes: Annotated[
        str, typer.Option("--block-sizes", metavar="A,B,...", help="Positions of a block.")
    ] = "8,16,32,64,128",
    batches: Annotated[
        str, typer.Option("--batches", metavar="A,B,...", help="Sequences of a step, 1 to 8.")
    ] = "1,2,4,8",
    repeats: Annotated[int, typer.Option("--repeats", "-r", metavar="N", help="Runs to take the median of.")] = 20,
    plot: Plot = None,
    backend: options.Backend = options.BackendChoice.AUTO,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """Measure what paging and batching cost a decode step.

    Attention and whole steps with paged and with static KV, and each cause's share of the time.
    """
    sizes_wanted, batch_list = _numbers("--block-sizes", block_sizes), _numbers("--batches", batches)
    if repeats < 1 or max(batch_list) > 8:
        raise OptionError("--repeats must be 1 or more, and --batches 1 to 8; correct them.")
    _check_plot(plot)

    from numba_atomflow.sandbox.compare import Grid, blocks_needed
    from numba_atomflow.sandbox.compare import compare as measure
    from numba_atomflow.sandbox.runner import cache_sizes

    with _opened(model, geometry, random_weights) as weights:
        limit = weights.geometry.max_positions
        grid = Grid(
            _contexts("--contexts", contexts, "128,512,1024,2048,4096,8192,16384", limit),
            _contexts("--step-contexts", step_contexts, "128,1024,4096", limit - 64),
            batch_list,
            repeats,
        )
        largest = max(sizes_wanted)
        blocks = blocks_needed(grid, largest) * largest // sizes_wanted[0]
        sizes = cache_sizes(weights.geometry, blocks, sizes_wanted, max(batch_list), grid.longest)
        with _runner(weights, backend, sizes, threads) as runner, output.steps_bar() as progress:
            found = measure(runner, str(weights.path), grid, progress)
    if plot is not None:
        from numba_atomflow.sandbox.plot import plot_comparison

        plot_comparison(found, plot)
    if as_json:
        output.emit_json({"machine": machine_record(), **found.to_dict()})
    else:
        output.emit(_comparison_tables(found))


# --- what a command needs --------------------------------------------------------------------------------------------


@contextmanager
def _opened(model: str | None, geometry: str | None, random_weights: bool) -> "Iterator[Checkpoint | RandomModel]":
    """The model that a command line names."""
    chosen = measured.Measured(model, geometry, random_weights)

    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.checkpoint.random_weights import RandomModel

    if isinstance(chosen.source, Path):
        with Checkpoint.open(chosen.source) as checkpoint:
            yield checkpoint
    else:
        yield RandomModel(chosen.geometry, name=geometry or "random")


@contextmanager
def _runner(
    weights: "Checkpoint | RandomModel", backend: options.BackendChoice, sizes: "CacheSizes", threads: int | None
) -> "Iterator[Runner]":
    """The model on a device, ready to run."""
    from numba_atomflow.checkpoint.arrays import WeightArrays
    from numba_atomflow.sandbox.choose import make_runner

    with output.loading_bar() as progress:
        arrays, check = WeightArrays(weights), weights.check_unchanged
        runner = make_runner(backend.value, weights.geometry, arrays, sizes, threads, check)
        try:
            runner.prepare(progress)
            check()
        except BaseException:
            runner.close()
            raise
    try:
        yield runner
    finally:
        runner.close()


def _tokenizer(
    weights: "Checkpoint | RandomModel", ignore_eos: bool
) -> tuple[Callable[[str], list[int]] | None, frozenset[int]]:
    """Text to tokens, and the tokens that end a reply; None and none for a model without a tokenizer."""
    if weights.text.tokenizer_json is None:
        return None, frozenset()
    from numba_atomflow.text.codec import TextCodec

    text = TextCodec(weights.text)
    return text.encode, frozenset() if ignore_eos else frozenset(text.eos_ids)


def _workload(
    trace: Path | None,
    rate: float | None,
    count: int,
    prompt_tokens: int | None,
    common_tokens: int,
    max_tokens: int,
    seed: int,
    encode: Callable[[str], list[int]] | None,
    end_tokens: frozenset[int],
    weights: "Checkpoint | RandomModel",
) -> "Workload":
    from numba_atomflow.sandbox.arrivals import poisson_arrivals, random_prompts, read_trace

    vocabulary = weights.geometry.vocabulary
    if trace is not None:
        return read_trace(trace, encode, vocabulary, end_tokens)
    if encode is None or prompt_tokens is not None:
        prompts = random_prompts(count, prompt_tokens or 64, vocabulary, common_tokens, seed)
    elif count < 1:
        raise OptionError(f"--requests {count} is no number of requests; give 1 or more.")
    else:
        prompts = [encode(PROMPTS[i % len(PROMPTS)]) for i in range(count)]
        largest = max(map(max, prompts))
        if largest >= vocabulary:
            raise TextError(
                f"The tokenizer makes token {largest}, but the model has {vocabulary}; get the model again, or give "
                "--prompt-tokens for random prompts."
            )
    return poisson_arrivals(rate or 0.0, prompts, max_tokens, end_tokens, seed)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} {text} is no list of numbers; give for example {option} 8,16.") from error
    if min(numbers) < 1:
        raise OptionError(f"{option} {text} has a number below 1; correct it.")
    return numbers


def _contexts(option: str, text: str | None, default: str, limit: int) -> tuple[int, ...]:
    """Contexts as asked for, or those of the default that the model allows."""
    if text is None:
        return tuple(context for context in _numbers(option, default) if context <= limit)
    numbers = _numbers(option, text)
    if max(numbers) > limit:
        raise OptionError(f"{option} {text} goes beyond the {limit} positions that this model allows; shorten it.")
    return numbers


def _check_plot(path: Path | None) -> None:
    if path is not None:
        from numba_atomflow.utils.plot import check_plot

        check_plot(path)


# --- what is shown ---------------------------------------------------------------------------------------------------


def _reply(request: "Request") -> dict[str, Any]:
    return {
        "id": request.id,
        "arrival_seconds": request.arrival,
        "prompt_tokens": len(request.prompt),
        "token_ids": request.output,
        "finish_reason": request.finish_reason,
        "ttft_seconds": request.ttft,
        "tpot_seconds": request.tpot,
        "shared_tokens": request.shared_tokens,
        "preemptions": request.preemptions,
    }


def _run_table(report: "ServingReport", model: str, device: str) -> str:
    def times(what: "Percentiles | None", factor: float, unit: str, digits: int = 1) -> str:
        if what is None:
            return "-"
        p50, p90, p99 = (f"{value * factor:.{digits}f}" for value in (what.p50, what.p90, what.p99))
        return f"{p50} / {p90} / {p99} {unit} (50th, 90th, 99th percentile)"

    peak = report.peak_utilisation
    rows = [
        ("model", model),
        ("device", device),
        ("served", f"{report.requests} requests, {report.prompt_tokens} prompt tokens, {report.tokens} tokens"),
        ("throughput", f"{report.throughput:.1f} tok/s over {report.seconds:.2f} s"),
        ("TTFT", times(report.ttft, 1e3, "ms")),
        ("TPOT", times(report.tpot, 1e3, "ms", 2)),
        ("latency", times(report.latency, 1e3, "ms")),
        (
            "blocks",
            f"{report.blocks} of {report.block_size}, in use {report.mean_utilisation:.0%} (at most {peak:.0%})",
        ),
        ("preemptions", str(report.preemptions)),
        ("copies on write", str(report.block_copies)),
        ("found in cache", f"{report.shared_tokens} tokens"),
        ("steps", f"{report.steps}, {report.mean_columns:.1f} tokens each"),
        ("scheduler", times(report.schedule, 1e6, "us per step")),
        ("page tables", times(report.table, 1e6, "us per step")),
        ("model", times(report.model, 1e3, "ms per step", 2)),
    ]
    return "".join(f"{name:<16} {value}\n" for name, value in rows)


def _comparison_tables(found: "Comparison") -> str:
    attention = [
        [
            str(row.context),
            str(row.block_size),
            f"{row.static_seconds * 1e6:.2f}",
            f"{row.paged_seconds * 1e6:.2f}",
            f"{row.paged_seconds / row.static_seconds:.3f}",
        ]
        for row in found.attention
    ]
    steps = [
        [
            str(row.batch),
            str(row.context),
            str(row.block_size),
            f"{row.static_seconds * 1e3:.3f}",
            f"{row.paged_seconds * 1e3:.3f}",
            f"{row.wall_seconds * 1e3:.3f}",
            f"{row.tokens_per_second:.0f}",
            *(f"{share:.1%}" for share in row.shares().values()),
        ]
        for row in found.steps
    ]
    return (
        f"model: {found.model}\ndevice: {found.device}\nmedians of {found.repeats} runs\n\n"
        "Attention of one layer, one token\n\n"
        + render("table", ["context", "block", "static us", "paged us", "paged/static"], attention)
        + "\nDecode step\n\n"
        + render(
            "table",
            [
                "batch",
                "context",
                "block",
                "static ms",
                "paged ms",
                "served ms",
                "tok/s",
                "indirection",
                "page tables",
                "scheduling",
                "host",
            ],
            steps,
        )
    )
