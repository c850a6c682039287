"""``numba-atomflow perplexity``: how well a model predicts a text, and how far it is from its source."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output

if TYPE_CHECKING:
    from numba_atomflow.perf.perplexity import Perplexity

EXAMPLES = """\b
Examples:
  numba-atomflow perplexity --text book.txt                     the default model
  numba-atomflow perplexity my-model.safetensors --text book.txt --context 2048 --stride 512
  numba-atomflow perplexity my-model.safetensors --text book.txt --reference path/to/model.gguf --json

\b
--reference needs transformers: pip install 'numba-atomflow[validate]'
"""


def perplexity(
    *,
    model: options.ModelArgument = DEFAULT_MODEL,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="The text to score, in UTF-8; - reads standard input.")
    ],
    context: options.Context = None,
    stride: options.Stride = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="SOURCE", help="Compare with the source that MODEL was converted from."),
    ] = None,
    engine_options: options.EngineOptions,
    as_json: options.Json = False,
) -> None:
    """Measure a model's perplexity on a text.

    Also bits per byte and speed; with --reference, KL divergence and top-1 agreement as well. Every token is scored
    once, most of them with at least N - M tokens before them.
    """
    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.files.text_input import read_standard_input, read_text_file
    from numba_atomflow.perf.perplexity import choose_windows, measure

    contents = read_standard_input() if str(text) == "-" else read_text_file(text, "--text")
    with Checkpoint.open(find_checkpoint(model)) as checkpoint:
        context, stride = choose_windows(checkpoint.geometry.max_positions, context, stride)
        logits = None
        if reference is not None:
            from numba_atomflow.sources import local_source
            from numba_atomflow.validate import original_logits

            with output.bytes_bar() as download_progress:
                logits = original_logits(checkpoint, local_source(reference, progress=download_progress))
    with engine_options.load(model, context) as engine, output.steps_bar(time_left=True) as progress:
        result = measure(engine, contents, context, stride, logits, progress)
    subject = {"model": model, "text": str(text)}
    if as_json:
        output.emit_json(subject | result.to_dict())
    else:
        _show(subject, result)


def _show(subject: dict[str, Any], result: "Perplexity") -> None:
    rows = [
        ("model", subject["model"]),
        ("text", f"{subject['text']}, {result.tokens:,} tokens scored"),
        ("perplexity", f"{result.perplexity:.4f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
        ("speed", f"{result.tokens_per_second:.1f} tokens/s"),
        ("windows", f"{result.context} tokens, {result.stride} new in each"),
    ]
    other = result.divergence
    if other is not None:
        rows += [
            ("reference", _reference_text(result.perplexity, other.reference_perplexity)),
            ("mean KL", f"{other.mean_kl:.5f} nats per token"),
            ("top-1", f"{other.top1:.2%} of positions agree"),
        ]
    output.emit("".join(f"{name:<15}{value}\n" for name, value in rows))


def _reference_text(model: float, reference: float) -> str:
    """The reference's perplexity, and how far ours is from it, unless one is infinite."""
    text = f"perplexity {reference:.4f}"
    if not math.isfinite(model) or not math.isfinite(reference):
        return text
    return f"{text}; the model's is {model / reference - 1:+.2%} from it"
