"""The reference implementation: transformers in float32 on the CPU.

It runs with the weights of the source, as transformers reads them ("original"), or with the checkpoint's FP8 weights,
dequantized ("dequantised"). The second isolates errors of the kernels; the first includes the quantization error.
"""

import io
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib import metadata as packages
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numba_atomflow import __version__
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.errors import ContextError, GroundTruthError, OptionError, SourceError
from numba_atomflow.files.stamp import stamps_of, unchanged
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.config_json import config_json
from numba_atomflow.sources import WeightSource, open_source
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.utils.arguments import file_path, whole_number
from numba_atomflow.utils.progress import Progress
from numba_atomflow.validate.ground_truth import FORMAT, FORMAT_VERSION, REFERENCES, precision_of, sha256
from numba_atomflow.validate.hooks import HookedModel
from numba_atomflow.validate.probes import Rows
from numba_atomflow.validate.reference import Reference
from numba_atomflow.validate.state_dict import as_in_transformers, compute_constants, state_dict


def make_ground_truth(
    checkpoint: Checkpoint,
    prompt: str | Sequence[int],
    decode_steps: int = 32,
    reference: str = "dequantised",
    source: Path | str | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Run transformers on a prompt and a greedy continuation, and record every probe.

    Args:
        checkpoint: the model.
        prompt: text, or token ids.
        decode_steps: tokens after the prompt, one per step.
        reference: "dequantised" or "original".
        source: for "original", the GGUF file or Hugging Face folder that the checkpoint was made from.
        progress: called with a description, tokens done and total tokens.

    Raises:
        GroundTruthError: transformers is not installed, or the source is not that of the checkpoint.
        OptionError: an unknown reference, no source for "original", an empty prompt, a negative number of steps.
        ContextError: prompt and steps exceed the model's positions.
        SourceError: the source cannot be read.
    """
    text = prompt if isinstance(prompt, str) else ""
    if isinstance(prompt, str):
        tokens = TextCodec(checkpoint.text).encode(prompt)
    else:
        tokens = [whole_number("a token", token) for token in prompt]
    decode_steps = whole_number("decode_steps", decode_steps)
    source = None if source is None else file_path("source", source)
    _check(checkpoint.geometry, tokens, decode_steps, reference, source)
    if progress:
        progress("loading transformers", 0, len(tokens) + decode_steps)
    with _quiet_transformers():
        model = _source_model(checkpoint, source) if source is not None else dequantized_model(checkpoint)
        run = HookedModel(model, checkpoint.geometry, len(tokens) + decode_steps)
        prompt_tokens = len(tokens)
        run.feed(tokens)
        for position in range(prompt_tokens, prompt_tokens + decode_steps):
            if progress:
                progress("transformers", position, prompt_tokens + decode_steps)
            tokens.append(int(run.tensors["logits"][position - 1].argmax()))
            run.feed(tokens[-1:])
    return Reference(
        label=f"transformers, {reference} weights",
        geometry=checkpoint.geometry,
        tokens=tuple(tokens),
        prompt_tokens=prompt_tokens,
        precision=precision_of(reference),
        tensors=run.tensors,
        metadata={
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "reference": reference,
            "text": text,
            "tokens": json.dumps(tokens),
            "prompt_tokens": str(prompt_tokens),
            "geometry": json.dumps(checkpoint.geometry.to_dict()),
            "versions": json.dumps(_versions()),
            "checkpoint_sha256": checkpoint.sha256(),
            "source": checkpoint.metadata.get("source", "{}"),
        },
    )


def original_logits(checkpoint: Checkpoint, source: Path) -> Callable[[Sequence[int]], Rows]:
    """A function from token ids to logits [T, V] of the source model of a checkpoint.

    Raises:
        GroundTruthError: transformers is not installed, or the source is not that of the checkpoint.
        SourceError: the source cannot be read.
    """
    _check_installed("A reference is computed")
    with _quiet_transformers():
        model = _source_model(checkpoint, source)

    def logits(tokens: Sequence[int]) -> Rows:
        import torch

        with torch.no_grad():
            rows: Rows = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
        return rows

    return logits


def _check(geometry: ModelGeometry, tokens: Sequence[int], steps: int, reference: str, source: Path | None) -> None:
    if reference not in REFERENCES:
        raise OptionError(f"There is no reference {reference!r}; choose {' or '.join(REFERENCES)}.")
    if reference == "original" and source is None:
        raise OptionError(
            "The original reference needs the model's source; name its GGUF file or folder with --source."
        )
    if reference != "original" and source is not None:
        raise OptionError("The dequantised reference uses the checkpoint's weights; leave --source out.")
    if not tokens:
        raise OptionError("The prompt is empty; give some text.")
    if not all(0 <= token < geometry.vocabulary for token in tokens):
        raise OptionError(f"The prompt holds a token that does not exist; the vocabulary has {geometry.vocabulary}.")
    if steps < 0:
        raise OptionError(f"--decode-steps is {steps}; it must be 0 or more.")
    if len(tokens) + steps > geometry.max_positions:
        raise ContextError(
            f"{len(tokens)} prompt tokens and {steps} decode steps do not fit the model's {geometry.max_positions} "
            "positions; shorten one of them."
        )
    if geometry.qkv_bias and geometry.qk_norm:
        raise GroundTruthError(
            "transformers has no model with both a bias and norms of q and k; compare backends instead."
        )
    if geometry.hidden % geometry.heads and not (geometry.qkv_bias or geometry.qk_norm):
        raise GroundTruthError(
            f"transformers takes no Llama whose hidden size ({geometry.hidden}) is not a multiple of its "
            f"{geometry.heads} heads; compare backends instead."
        )
    _check_installed("A ground truth is made")


def _check_installed(what: str) -> None:
    for name in ("torch", "transformers", "accelerate"):  # transformers needs accelerate to read GGUF
        if find_spec(name) is None:
            raise GroundTruthError(
                f"{what} with transformers, but {name} is not installed; run pip install 'numba-atomflow[validate]'."
            )


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "numpy")
    return {
        "numba-atomflow": __version__,
        "python": platform.python_version(),
        **{name: packages.version(name) for name in names},
    }


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress progress bars, warnings and standard error of transformers."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the GGUF reader draws its own bar
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- the two models --------------------------------------------------------------------------------------------------


def _source_model(checkpoint: Checkpoint, path: Path) -> Any:
    """The source model, read by transformers.

    FP8 models are read by this project's reader, which dequantizes them to float32: transformers needs a GPU or further
    packages for them, and rounds to bfloat16.
    """
    source = open_source(path)
    with unchanged(stamps_of(source.files), SourceError):
        return _read_source_model(checkpoint, source)


def _read_source_model(checkpoint: Checkpoint, source: WeightSource) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = source.path
    record = json.loads(checkpoint.metadata.get("source", "{}"))
    for file in source.files:
        if record.get("sha256", {}).get(file.name) != sha256(file):
            raise GroundTruthError(f"{file} is not what {checkpoint.path} was made from; give the same source.")
    if source.fp8_scheme:
        weights = as_in_transformers(checkpoint.geometry, {name: source.read(name) for name in source.names()})
        return _model_with_weights(
            checkpoint.geometry, {name: torch.from_numpy(values) for name, values in weights.items()}
        )
    folder, more = (path, {}) if source.kind == "hf" else (path.parent, {"gguf_file": path.name})
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True, **more
    )
    for parameter in model.parameters():  # float32 weights are still mapped from the file, which may change
        parameter.data = parameter.data.clone()
    return model.eval()


def dequantized_model(checkpoint: Checkpoint) -> Any:
    """transformers' model with the dequantized weights of the checkpoint, in float32 on the CPU.

    Raises:
        GroundTruthError: transformers is not installed.
    """
    _check_installed("The model runs")
    import torch

    state = {name: torch.from_numpy(values) for name, values in state_dict(checkpoint).items()}
    return _model_with_weights(checkpoint.geometry, state)


def _model_with_weights(geometry: ModelGeometry, state: dict[str, Any]) -> Any:
    """transformers' model of the family with these weights, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(**config_json(geometry))
    with torch.device("meta"):  # allocates and initializes nothing
        auto: Any = AutoModelForCausalLM
        model: Any = auto.from_config(config, attn_implementation="eager")
    model.load_state_dict(state, assign=True)
    compute_constants(model, config)
    return model.eval()
