"""``numba-atomflow quantize``: calibrated FP8 quantization of a model (AWQ, GPTQ)."""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError

if TYPE_CHECKING:
    from numba_atomflow.checkpoint.format import Checkpoint

EXAMPLES = """\b
Examples:
  numba-atomflow quantize model.gguf model.safetensors
  numba-atomflow quantize path/to/hugging-face-folder model.safetensors --calibration my-texts.txt
  numba-atomflow quantize model.gguf model.safetensors --method awq --lm-head fp8
  numba-atomflow perplexity model.safetensors --text book.txt --reference model.gguf

\b
Methods: rtn rounds to nearest, in seconds. awq and gptq minimize the error on a calibration text: awq searches scales
of input channels and the clipping of groups; gptq searches the clipping, and compensates rounding errors in later
weights.
"""


class MethodChoice(StrEnum):
    """Values of --method."""

    RTN = "rtn"
    AWQ = "awq"
    GPTQ = "gptq"


class HeadChoice(StrEnum):
    """Values of --lm-head."""

    FP8 = "fp8"
    FP16 = "fp16"


def quantize(
    source: options.Source,
    destination: options.Destination,
    method: Annotated[MethodChoice, typer.Option("--method", help="How weights are rounded.")] = MethodChoice.GPTQ,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Text of the kind that the model is for, in UTF-8.  [default: Python's documentation strings]",
        ),
    ] = None,
    lm_head: Annotated[
        HeadChoice,
        typer.Option("--lm-head", help="Format of the LM head, and of the embedding if they are tied."),
    ] = HeadChoice.FP16,
    group_size: Annotated[
        int, typer.Option("--group-size", metavar="N", help="Weights that share a scale; kernels read 128 only.")
    ] = 128,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a model to FP8 with calibration.

    DEST appears complete or not at all. If awq or gptq is stopped, even by a kill, the same command resumes after the
    last finished layer (kept in DEST.unfinished), and the result is the same to the byte.
    """
    started = time.perf_counter()
    if group_size != 128:
        raise OptionError(f"--group-size is {group_size}; kernels read groups of 128 only, so leave it out.")

    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.convert import convert

    with output.bytes_bar() as progress:
        convert(
            source,
            destination,
            revision=revision,
            method=method.value,
            calibration=calibration,
            head=lm_head.value,
            overwrite=overwrite,
            progress=progress,
            warn=output.warn,
        )
    with Checkpoint.open(destination) as checkpoint:
        record = _record(checkpoint, method, time.perf_counter() - started)
    if as_json:
        output.emit_json(record)
    else:
        _show(record)


def _record(checkpoint: "Checkpoint", method: MethodChoice, seconds: float) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "parameters": checkpoint.geometry.parameter_count(),
        "method": method.value,
        "head": checkpoint.head,
        "seconds": seconds,
        "calibration": json.loads(checkpoint.metadata.get("calibration", "null")),
    }


def _show(record: dict[str, Any]) -> None:
    how = f"{record['method']}, {record['head']} head, {record['seconds']:.1f} s"
    lines = [f"{record['path']}: {record['parameters']:,} parameters in {output.size(record['bytes'])}, {how}"]
    calibration = record["calibration"]
    if calibration is not None:
        lines.append(f"calibrated on {calibration['tokens']:,} tokens of {calibration['text']}; relative error there:")
        for projection in ("qkv", "o", "gate_up", "down"):
            pairs = [pair for name, pair in calibration["errors"].items() if name.endswith("." + projection)]
            rounded, kept = (sum(pair[key] for pair in pairs) / len(pairs) for key in ("rtn", "kept"))
            lines.append(
                f"  {projection:<8}{rounded:8.3%} rounded to nearest, {kept:7.3%} as stored (mean over layers)"
            )
    output.emit("\n".join(lines) + "\n")
