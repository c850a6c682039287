"""``numba-atomflow batch run | perplexity | validate``: many prompts or texts over CPU cores, GPUs or a Ray cluster."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.cli.option_groups import OptionGroup

if TYPE_CHECKING:
    from numba_atomflow.batch import ActorOptions, BatchReport, EngineOptions

RUN_EXAMPLES = """\b
Examples:
  numba-atomflow batch run prompts.jsonl results/                       the default model, on this machine
  numba-atomflow batch run prompts.jsonl results/ -m my-model --max-tokens 200 --json
  numba-atomflow batch run prompts.jsonl results/ --address auto        on the Ray cluster of this machine

\b
A line of prompts.jsonl, of which only the prompt (or messages) must be there:
  {"id": "a1", "prompt": "The capital of France is", "params": {"max_tokens": 8}}

\b
results/results.jsonl has a line for each, in the same order. After an interruption the same command continues.
Needs Ray: pip install 'numba-atomflow[ray]'
"""

PERPLEXITY_EXAMPLES = """\b
Examples:
  numba-atomflow batch perplexity texts.jsonl results/ --context 2048
  numba-atomflow batch perplexity texts.jsonl results/ -m my-model --json
A line of texts.jsonl: {"id": "a1", "text": "..."}

\b
Needs Ray: pip install 'numba-atomflow[ray]'
"""

VALIDATE_EXAMPLES = """\b
Examples:
  numba-atomflow batch validate prompts.jsonl results/ --decode-steps 8
  numba-atomflow batch validate prompts.jsonl results/ -m my-model --json
A line of prompts.jsonl: {"id": "a1", "prompt": "..."}

\b
Exit code: 0 all rows pass, 1 some fail or have an error, 2 the batch could not run.
Needs Ray and transformers: pip install 'numba-atomflow[ray,validate]'
"""

FAILED = 1

Rows = Annotated[Path, typer.Argument(metavar="IN.jsonl", help="A JSON object on each line.")]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="The folder of the results; one that holds a part of this batch is completed."),
]
RowsPerShard = Annotated[
    int,
    typer.Option(
        "--rows-per-shard", metavar="N", help="Rows that one process runs in turn, and that are kept at once."
    ),
]


@dataclass(frozen=True)
class ClusterOptions(OptionGroup):
    """Where a batch runs."""

    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="local: a Ray of its own on this machine; auto: the Ray that runs here; or HOST:PORT of a cluster.",
        ),
    ] = "local"
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors",
            metavar="N",
            help="Processes, each with the model.  [default: one per GPU, or one per --threads CPU cores]",
        ),
    ] = None
    quiet: options.Quiet = False

    def choice(self) -> "ActorOptions":
        """The same for a batch."""
        from numba_atomflow.batch import ActorOptions

        return ActorOptions(self.address, self.actors, self.quiet)


Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU cores of each process.  [default: 1]")]


@dataclass(frozen=True)
class ActorEngineOptions(OptionGroup):
    """How each process runs the model."""

    backend: options.Backend = options.BackendChoice.AUTO
    decode: options.Decode = options.DecodeChoice.AUTO
    prefill: options.Prefill = options.PrefillChoice.AUTO
    prefill_chunk: options.PrefillChunk = None
    threads: Threads = None
    private_copy: options.PrivateCopy = False

    def choice(self, max_seq_len: int | None) -> "EngineOptions":
        """The same for a batch."""
        from numba_atomflow.batch import EngineOptions

        return EngineOptions(
            self.backend.value,
            max_seq_len,
            self.threads,
            self.decode.value,
            self.prefill.value,
            self.prefill_chunk,
            self.private_copy,
        )


def run(
    *,
    rows: Rows,
    out: Out,
    model: options.Model = DEFAULT_MODEL,
    sampling: options.SamplingOptions,
    ignore_eos: options.IgnoreEos = False,
    rows_per_shard: RowsPerShard = 16,
    max_seq_len: options.MaxSeqLen = None,
    cluster: ClusterOptions,
    engine_options: ActorEngineOptions,
    as_json: options.Json = False,
) -> None:
    """Reply to every prompt of a file.

    The sampling options are for rows without `params` of their own. A row that cannot be run has an `error` in its
    result; the others are not affected.
    """
    from numba_atomflow.batch import generate_batch

    report = generate_batch(
        rows,
        out,
        model,
        sampling.params(ignore_eos),
        actors=cluster.choice(),
        engine=engine_options.choice(max_seq_len),
        rows_per_shard=rows_per_shard,
    )
    _show(report, as_json=as_json)


def perplexity(
    *,
    rows: Rows,
    out: Out,
    model: options.Model = DEFAULT_MODEL,
    context: options.Context = None,
    stride: options.Stride = None,
    cluster: ClusterOptions,
    engine_options: ActorEngineOptions,
    as_json: options.Json = False,
) -> None:
    """Measure a model's perplexity on every text of a file, and on all of them together."""
    from numba_atomflow.batch import perplexity_batch

    report = perplexity_batch(
        rows, out, model, context, stride, actors=cluster.choice(), engine=engine_options.choice(None)
    )
    _show(report, as_json=as_json)


def validate(
    *,
    rows: Rows,
    out: Out,
    model: options.Model = DEFAULT_MODEL,
    decode_steps: Annotated[int, typer.Option("--decode-steps", metavar="N", help="Tokens after each prompt.")] = 32,
    max_seq_len: options.MaxSeqLen = None,
    cluster: ClusterOptions,
    engine_options: ActorEngineOptions,
    as_json: options.Json = False,
) -> None:
    """Compare every layer with transformers, on every prompt of a file."""
    from numba_atomflow.batch import validate_batch

    report = validate_batch(
        rows, out, model, decode_steps, actors=cluster.choice(), engine=engine_options.choice(max_seq_len)
    )
    _show(report, as_json=as_json)
    if report.failed or report.errors:
        raise typer.Exit(FAILED)


def _show(report: "BatchReport", *, as_json: bool) -> None:
    if as_json:
        output.emit_json(report.to_dict())
        return
    cached = f", {report.reused_tokens:,} of them cached" if report.reused_tokens else ""
    lines = [
        ("results", str(report.path)),
        ("rows", f"{report.rows:,}, {report.errors:,} of them with an error"),
        ("shards", f"{report.shards:,}, {report.resumed_shards:,} of them from an earlier run"),
    ]
    if report.prompt_tokens:
        lines.append(("prompts", f"{report.prompt_tokens:,} tokens{cached}"))
    if report.tokens:
        lines.append(("tokens", f"{report.tokens:,}"))
    if report.actors:
        speed = f", {report.tokens_per_second:.1f} tokens/s" if report.tokens_per_second else ""
        lines.append(("this run", f"{report.actors} processes, {report.seconds:.1f} s{speed}"))
    if report.perplexity is not None:
        lines.append(("perplexity", f"{report.perplexity:.4f}"))
    if report.failed:
        lines.append(("failed", f"{report.failed:,} rows do not pass"))
    output.emit("".join(f"{name:<12}{value}\n" for name, value in lines))
