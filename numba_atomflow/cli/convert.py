"""``numba-atomflow convert``: a GGUF file, a Hugging Face folder or a model of the hub becomes an FP8 checkpoint."""

import time

from numba_atomflow.cli import options, output

EXAMPLES = """\b
Examples:
  numba-atomflow convert model.gguf model.safetensors
  numba-atomflow convert path/to/hugging-face-folder model.safetensors
  numba-atomflow convert Qwen/Qwen3-0.6B qwen.safetensors
  numba-atomflow convert model.gguf ~/.cache/numba-atomflow/models/mine.safetensors
  numba-atomflow chat --model mine
"""


def convert(
    source: options.Source,
    destination: options.Destination,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Convert a model to an FP8 checkpoint.

    Weights are rounded to nearest, in groups of 128.

    DEST appears complete or not at all: after an interruption, run the same command again. A model of the hub is kept
    in the cache folder, and an interrupted download is resumed. Weights that are FP8 already are kept as they are.
    """
    started = time.perf_counter()

    from numba_atomflow.checkpoint.format import Checkpoint
    from numba_atomflow.convert import convert as convert_model

    with output.bytes_bar() as progress:
        convert_model(
            source,
            destination,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
            warn=output.warn,
        )
    seconds = time.perf_counter() - started
    with Checkpoint.open(destination) as checkpoint:
        parameters, written = checkpoint.geometry.parameter_count(), checkpoint.path.stat().st_size
        if as_json:
            output.emit_json(
                {"path": str(checkpoint.path), "bytes": written, "parameters": parameters, "seconds": seconds}
            )
        else:
            output.emit(f"{checkpoint.path}: {parameters:,} parameters in {output.size(written)}, {seconds:.1f} s\n")
