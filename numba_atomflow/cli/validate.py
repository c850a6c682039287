"""``numba-atomflow validate``: every layer compared with a reference, down to the first op that diverges."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.cli.diff_gpus import check_several_gpus, show_diff_gpus
from numba_atomflow.cli.ground_truth import read_prompt
from numba_atomflow.cli.report_files import ReportFiles
from numba_atomflow.cli.widths import parse_widths, show_widths
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.files.untrusted import escape_controls, quote

if TYPE_CHECKING:
    from numba_atomflow.backends.base import Backend
    from numba_atomflow.engine import Engine
    from numba_atomflow.validate import Reference, Report

EXAMPLES = """\b
Examples:
  numba-atomflow ground-truth --prompt "The capital of France is" --out truth.safetensors
  numba-atomflow validate --ground-truth truth.safetensors              the default model
  numba-atomflow validate my-model.safetensors --ground-truth truth.safetensors --isolate --layers 10:20
  numba-atomflow validate my-model.safetensors --ground-truth truth.safetensors --plot errors.png
  numba-atomflow validate my-model.safetensors --diff-backends --prompt "The capital of France is"
  numba-atomflow validate my-model.safetensors --diff-chunks --prefill gemm --prompt - <README.md
  numba-atomflow validate --ground-truth truth.safetensors --added --html report.html --junit report.xml
  numba-atomflow validate --replay 3 --prompt "The capital of France is"
  numba-atomflow validate --widths 1,2,4,8 --prompt "The capital of France is"
  numba-atomflow validate my-model.safetensors --gpus 2 --diff-gpus --prompt "The capital of France is"

\b
Exit code: 0 all probes pass, 1 some fail, 2 the validation could not run.
"""

FAILED = 1
MIN_RUNS = 2  # of --replay


def validate(
    *,
    model: options.ModelArgument = DEFAULT_MODEL,
    ground_truth: Annotated[
        Path | None,
        typer.Option("--ground-truth", "-g", metavar="FILE", help="Made by `numba-atomflow ground-truth`."),
    ] = None,
    diff_backends: Annotated[
        bool, typer.Option("--diff-backends", help="Compare the backend with the CPU backend; needs no ground truth.")
    ] = False,
    diff_chunks: Annotated[
        bool,
        typer.Option("--diff-chunks", help="Compare a prompt in chunks with the same prompt token by token."),
    ] = False,
    diff_gpus: Annotated[
        bool, typer.Option("--diff-gpus", help="Compare every bit of the decode steps of --gpus N with those of one.")
    ] = False,
    replay: Annotated[
        int | None,
        typer.Option(
            "--replay", metavar="N", help="Run the same prompt N times, and compare every bit of the results."
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            metavar="N,...",
            help="Run 64 tokens after a prompt in steps of N tokens, and compare every bit with decode steps.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="For --diff-..., --replay and --widths: the text; - reads standard input.",
        ),
    ] = None,
    decode_steps: Annotated[
        int, typer.Option("--decode-steps", metavar="N", help="For --diff-... and --replay: tokens after the prompt.")
    ] = 32,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Feed each layer the reference's input, so that errors do not add up.")
    ] = False,
    added: Annotated[
        bool,
        typer.Option("--added", help="Feed each op the reference's inputs too: its own error beside what it inherits."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="A:B", help="Compare layers A to B - 1 only.  [default: everything]"),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option("--block", metavar="N", help="Prompt tokens per step.  [default: the backend's prefill chunk]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="IMAGE", help="Draw the errors into a file.")] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the result as JUnit XML, for CI.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report with pictures, as one HTML file.")
    ] = None,
    inject: Annotated[str | None, typer.Option("--inject", metavar="OP", hidden=True)] = None,
    engine_options: options.EngineOptions,
    as_json: options.Json = False,
) -> None:
    """Compare every layer with a reference, or a backend with itself.

    The reference is a run of transformers (a ground truth), the CPU backend, or the same backend token by token. The
    last line names the first probe that fails, and the op at fault. --replay has no reference: it runs one prompt
    several times. Nor has --widths: it runs one text in steps of different numbers of tokens. That of --diff-gpus is
    one GPU.
    """
    whole_runs = {"--replay": replay is not None, "--widths": widths is not None, "--diff-gpus": diff_gpus}
    _check_combination([ground_truth is not None, diff_backends, diff_chunks], whole_runs, engine_options)
    layer_range = _parse_layers(layers)
    files = ReportFiles(plot, junit, html)
    files.check()
    text = None if prompt is None else read_prompt(prompt)
    whole_run = next((name for name, given in whole_runs.items() if given), None)
    if whole_run and (isolate or added or layers is not None or block is not None or inject or plot):
        raise OptionError(
            f"{whole_run} compares whole runs; leave --isolate, --added, --layers, --block and --plot out."
        )
    if whole_run in ("--widths", "--diff-gpus") and (junit or html):
        raise OptionError(f"{whole_run} writes no report files; leave --junit and --html out, and take --json.")
    if diff_gpus:
        check_several_gpus(engine_options)
        ids = _encode(model, text, decode_steps, "--diff-gpus")
        passed = show_diff_gpus(model, ids, decode_steps, engine_options, as_json=as_json)
    elif widths is not None:
        ids = _encode(model, text, 0, "--widths")
        passed = show_widths(model, ids, parse_widths(widths), engine_options, as_json=as_json)
    elif replay is not None:
        passed = _replay(model, text, decode_steps, replay, engine_options, files, as_json=as_json)
    else:
        if ground_truth is not None:
            reference = _open(ground_truth, model, text)
        else:
            record = _token_reference if diff_chunks else _cpu_reference
            reference = record(model, text, decode_steps, engine_options)
        checks = Checks(isolate, added, layer_range, block, inject, diff_chunks)
        passed = _compare(model, reference, checks, engine_options, files, as_json=as_json)
    if not passed:
        raise typer.Exit(FAILED)


def _check_combination(
    references: Sequence[bool], whole_runs: Mapping[str, bool], engine_options: options.EngineOptions
) -> None:
    """Which references, and which checks of whole runs, are asked for."""
    if sum([*references, *whole_runs.values()]) != 1:
        raise OptionError(
            "A validation needs one reference; give --ground-truth, --diff-backends, --diff-chunks, --replay, --widths "
            "or --diff-gpus."
        )
    if engine_options.prefill is options.PrefillChoice.FP8 and not any(whole_runs.values()):
        raise OptionError(
            "validate allows for no rounding of activations to FP8; use --prefill gemm, and perplexity to measure fp8."
        )


class Checks(NamedTuple):
    """How a backend is compared with a reference: options of that name."""

    isolate: bool
    added: bool
    layers: range | None
    block: int | None
    inject: str | None
    diff_chunks: bool


def _compare(
    model: str,
    reference: "Reference",
    checks: Checks,
    engine_options: options.EngineOptions,
    files: ReportFiles,
    *,
    as_json: bool,
) -> bool:
    """Compare a backend with a reference, show and write the result; returns whether it passed."""
    from numba_atomflow import validate as validator
    from numba_atomflow.model.step import SAMPLE

    with engine_options.load(model, len(reference.tokens)) as engine, output.steps_bar() as progress:
        device = engine.backend
        if checks.diff_chunks:
            _check_chunks(device, reference, checks.block)
        observers = [validator.inject(checks.inject, device.step(1, SAMPLE))] if checks.inject is not None else []
        report = validator.check(
            device,
            reference,
            isolate=checks.isolate,
            added=checks.added,
            layers=checks.layers,
            block=checks.block,
            observers=observers,
            progress=progress,
        )
        if as_json:
            output.emit_json(report.to_dict() | {"next_token": _next_token(engine, report)})
        else:
            _show(engine, report)
    files.write(report, model)
    return report.passed


def _replay(
    model: str,
    text: str | None,
    steps: int,
    runs: int,
    engine_options: options.EngineOptions,
    files: ReportFiles,
    *,
    as_json: bool,
) -> bool:
    """Run a prompt several times, show and write the result; returns whether the bits were the same."""
    from numba_atomflow.validate import replay

    if runs < MIN_RUNS:
        raise OptionError(f"--replay is {runs}; it takes at least {MIN_RUNS} runs to compare.")
    prompt = _encode(model, text, steps, "--replay")
    with engine_options.load(model, len(prompt) + steps) as engine, output.steps_bar() as progress:
        report = replay(engine.backend, engine.geometry, prompt, steps, runs, progress)
    if as_json:
        output.emit_json(report.to_dict())
    else:
        output.emit(f"{report.backend}: {report.prompt_tokens} prompt tokens, {report.decode_steps} decode steps\n")
        output.emit(f"{report.verdict()}\n")
    files.write(report, model)
    return report.passed


def _parse_layers(text: str | None) -> range | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if found is None:
        raise OptionError(f"--layers {quote(text)} is not of the form A:B; give for example --layers 0:4.")
    if int(found[1]) >= int(found[2]):
        raise OptionError(f"--layers {text} holds no layer: A:B stands for A to B - 1; give for example --layers 0:4.")
    return range(int(found[1]), int(found[2]))


# --- references ------------------------------------------------------------------------------------------------------


def _open(path: Path, model: str, text: str | None) -> "Reference":
    """A ground truth that fits the model."""
    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.validate import check_fits, open_ground_truth

    truth = open_ground_truth(path)
    with Checkpoint.open(find_checkpoint(model)) as checkpoint:
        check_fits(truth, path, checkpoint, text)
    return truth


def _cpu_reference(model: str, text: str | None, steps: int, engine_options: options.EngineOptions) -> "Reference":
    """The CPU backend's results for a prompt, if the backend to be compared is another one."""
    from numba_atomflow.validate import record

    prompt = _encode(model, text, steps, "--diff-backends")
    with engine_options.load(model, 1) as engine:
        name = engine.backend.name
    if name == "cpu":
        raise BackendError(
            "--diff-backends compares another backend with the CPU backend, and only that one runs here."
        )
    with engine_options.on_cpu().load(model, len(prompt) + steps) as engine, output.steps_bar() as progress:
        return record(engine.backend, engine.geometry, prompt, steps, progress=progress)


def _token_reference(model: str, text: str | None, steps: int, engine_options: options.EngineOptions) -> "Reference":
    """The backend's own results for a prompt, which it runs as decode steps."""
    from numba_atomflow.validate import record

    prompt = _encode(model, text, steps, "--diff-chunks")
    with engine_options.load(model, len(prompt) + steps) as engine, output.steps_bar() as progress:
        return record(engine.backend, engine.geometry, prompt, steps, block=1, progress=progress)


def _check_chunks(backend: "Backend", reference: "Reference", block: int | None) -> None:
    """Refuse a prompt that is not in chunks: then the backend would be compared with itself."""
    from numba_atomflow.ops.cuda.gemv.projections import MAX_GEMV_WIDTH

    if backend.observed_chunk == 1:
        raise OptionError(
            "--diff-chunks is not possible here: steps under observation take one token; use --widths, or --diff-gpus."
        )
    path = backend.prefill_path
    if path is None:
        gemv_tokens = backend.verification.width
    else:
        gemv_tokens = 1 if path.name == "gemv" else MAX_GEMV_WIDTH
    longest = min(block or backend.observed_chunk, reference.prompt_tokens)
    if longest <= gemv_tokens:
        raise OptionError(
            f"--diff-chunks needs a chunk of more than {gemv_tokens} tokens, and the longest one here has {longest}; "
            "give a longer --prompt, or a larger --block."
        )


def _encode(model: str, text: str | None, steps: int, option: str) -> list[int]:
    """The prompt's tokens."""
    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.text.codec import TextCodec

    if not text:
        raise OptionError(f"{option} needs a text to run; give --prompt TEXT.")
    if steps < 0:
        raise OptionError(f"--decode-steps is {steps}; it must be 0 or more.")
    with Checkpoint.open(find_checkpoint(model)) as checkpoint:
        return TextCodec(checkpoint.text).encode(text)


# --- output ----------------------------------------------------------------------------------------------------------


def _next_token(engine: "Engine", report: "Report") -> dict[str, str] | None:
    """The token after the prompt as text: the model's, and the reference's."""
    if report.logits is None or engine.checkpoint.text.tokenizer_json is None:
        return None
    tokens = {"model": report.logits.next_token, "reference": report.logits.expected_token}
    return {who: engine.text.decode([token], skip_special=False) for who, token in tokens.items()}


def _show(engine: "Engine", report: "Report") -> None:
    import io
    import sys

    from rich.console import Console

    lines = io.StringIO()
    # Lines to a file or a pipe are not wrapped.
    width = None if sys.stdout.isatty() else 200
    console = Console(file=lines, width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(report.rich_table())
    console.print(
        f"\n{report.backend} against {escape_controls(report.reference)}: {report.prompt_tokens} prompt tokens, "
        f"{report.decode_steps} decode steps" + (", layers isolated" if report.isolated else ""),
        markup=False,
    )
    logits = report.logits
    if logits is not None:
        console.print(
            f"logits: arg-max agrees at {logits.agreed} of {logits.positions} positions"
            + (f" (first other at {logits.first_disagreement})" if logits.first_disagreement is not None else "")
            + f", KL mean {logits.mean_kl:.2e}, max {logits.max_kl:.2e} nats",
            markup=False,
        )
        next_token = _next_token(engine, report)
        if next_token is not None:
            console.print(
                f"next token: {next_token['model']!r}, the reference's is {next_token['reference']!r}", markup=False
            )
    console.print(escape_controls(report.verdict()), markup=False)
    output.emit(lines.getvalue(), raw=True)  # with rich's colours
