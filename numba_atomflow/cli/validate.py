"""``numba-atomflow validate``: every layer compared with a reference, down to the first op that diverges."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.cli.ground_truth import read_prompt
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.files.untrusted import escape_controls

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

\b
Exit code: 0 all probes pass, 1 some fail, 2 the validation could not run.
"""

FAILED = 1


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
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="For --diff-...: the text to run; - reads standard input."),
    ] = None,
    decode_steps: Annotated[
        int, typer.Option("--decode-steps", metavar="N", help="For --diff-...: tokens after the prompt.")
    ] = 32,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Feed each layer the reference's input, so that errors do not add up.")
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
    inject: Annotated[str | None, typer.Option("--inject", metavar="OP", hidden=True)] = None,
    engine_options: options.EngineOptions,
    as_json: options.Json = False,
) -> None:
    """Compare every layer with a reference.

    The reference is a run of transformers (a ground truth), the CPU backend, or the same backend token by token. The
    last line names the first probe that fails; with --isolate, also the op at fault.
    """
    if (ground_truth is not None) + diff_backends + diff_chunks != 1:
        raise OptionError("A validation needs one reference; give --ground-truth, --diff-backends or --diff-chunks.")
    if engine_options.prefill is options.PrefillChoice.FP8:
        raise OptionError(
            "validate allows for no rounding of activations to FP8; use --prefill gemm, and perplexity to measure fp8."
        )
    layer_range = _parse_layers(layers)

    from numba_atomflow import validate as validator
    from numba_atomflow.model.step import SAMPLE
    from numba_atomflow.utils.plot import check_plot
    from numba_atomflow.validate.plot import plot as draw

    if plot is not None:
        check_plot(plot)
    text = None if prompt is None else read_prompt(prompt)
    if ground_truth is not None:
        reference = _open(ground_truth, model, text)
    else:
        record = _token_reference if diff_chunks else _cpu_reference
        reference = record(model, text, decode_steps, engine_options)
    with engine_options.load(model, len(reference.tokens)) as engine, output.steps_bar() as progress:
        device = engine.backend
        if diff_chunks:
            _check_chunks(device, reference, block)
        observers = [validator.inject(inject, device.step(1, SAMPLE))] if inject is not None else []
        report = validator.check(
            device, reference, isolate=isolate, layers=layer_range, block=block, observers=observers, progress=progress
        )
        if as_json:
            output.emit_json(report.to_dict() | {"next_token": _next_token(engine, report)})
        else:
            _show(engine, report)
    if plot is not None:
        draw(report, plot)
    if not report.passed:
        raise typer.Exit(FAILED)


def _parse_layers(text: str | None) -> range | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise OptionError(f"--layers {text} is not of the form A:B; give for example --layers 0:4.")
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

    path = backend.prefill_path
    gemv_tokens = 1 if path is None or path.name == "gemv" else MAX_GEMV_WIDTH
    longest = min(block or backend.prefill_chunk, reference.prompt_tokens)
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
            f"logits: arg-max agrees at {logits.agreed} of {logits.positions} positions, "
            f"KL mean {logits.mean_kl:.2e}, max {logits.max_kl:.2e} nats",
            markup=False,
        )
        next_token = _next_token(engine, report)
        if next_token is not None:
            console.print(
                f"next token: {next_token['model']!r}, the reference's is {next_token['reference']!r}", markup=False
            )
    console.print(escape_controls(report.verdict()), markup=False)
    output.emit(lines.getvalue(), raw=True)  # with rich's colours
