"""``numba-atomflow ground-truth``: the activations of transformers for a prompt, layer by layer, as a file."""

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.errors import DestinationError
from numba_atomflow.files.text_input import read_standard_input

EXAMPLES = """\b
Examples:
  numba-atomflow ground-truth --prompt "The capital of France is" --out truth.safetensors
  numba-atomflow ground-truth my-model.safetensors --prompt - --out truth.safetensors < prompt.txt
  numba-atomflow ground-truth my-model.safetensors --prompt "Once" --out original.safetensors \\
      --reference original --source path/to/model.gguf
  numba-atomflow validate my-model.safetensors --ground-truth truth.safetensors

\b
Needs transformers: pip install 'numba-atomflow[validate]'
"""


class ReferenceChoice(StrEnum):
    """Values of --reference."""

    DEQUANTISED = "dequantised"
    ORIGINAL = "original"


def ground_truth(
    *,
    model: options.ModelArgument = DEFAULT_MODEL,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to run; - reads standard input.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The safetensors file to write.")],
    decode_steps: Annotated[int, typer.Option("--decode-steps", metavar="N", help="Tokens after the prompt.")] = 32,
    reference: Annotated[
        ReferenceChoice,
        typer.Option("--reference", help="The checkpoint's FP8 weights, dequantized, or those of its source."),
    ] = ReferenceChoice.DEQUANTISED,
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="SOURCE", help="For original: the GGUF file or folder it was made from."),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a reference run of transformers.

    It runs in float32 on the CPU; the file has every probe. FILE appears complete or not at all.
    """
    started = time.perf_counter()
    if out.exists() and not overwrite:
        raise DestinationError(f"{out} exists; choose another name, or replace it with --overwrite.")
    text = read_prompt(prompt)

    from numba_atomflow.checkpoint.find import find_checkpoint
    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.validate import make_ground_truth, save_ground_truth

    with Checkpoint.open(find_checkpoint(model)) as checkpoint, output.steps_bar() as progress:
        truth = make_ground_truth(checkpoint, text, decode_steps, reference.value, source, progress)
        save_ground_truth(truth, out)
    record = {
        "path": str(out),
        "bytes": out.stat().st_size,
        "reference": reference.value,
        "probes": len(truth.tensors),
        "prompt_tokens": truth.prompt_tokens,
        "decode_steps": decode_steps,
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        output.emit_json(record)
    else:
        output.emit(
            f"{out}: {record['probes']} probes and stages of {truth.prompt_tokens} prompt tokens and {decode_steps} "
            f"decode steps, {output.size(out.stat().st_size)}, {record['seconds']:.1f} s\n"
        )


def read_prompt(prompt: str) -> str:
    """The prompt itself, or standard input for ``-``; one newline at its end is dropped."""
    return read_standard_input().removesuffix("\n") if prompt == "-" else prompt
