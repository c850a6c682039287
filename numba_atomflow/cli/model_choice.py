"""The model of `bench`, `profile` and `sandbox`: a checkpoint, or a well-known geometry with random weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.cli.option_groups import OptionGroup
from numba_atomflow.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from numba_atomflow.engine import Engine
    from numba_atomflow.geometry import ModelGeometry

_PRESETS = "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.3-70b, smollm2-135m"  # not imported: NumPy is slow

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{options.MODEL_HELP}  [default: {DEFAULT_MODEL}]", show_default=False),
]
Geometry = Annotated[
    str | None,
    typer.Option("--geometry", metavar="NAME", help=f"Instead of a model: one of {_PRESETS}."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="With --geometry: random weights; nothing is downloaded.")
]


@dataclass(frozen=True)
class ModelChoice(OptionGroup):
    """The model that is run."""

    model: Model = None
    geometry: Geometry = None
    random_weights: RandomWeights = False

    def find(self) -> "ChosenModel":
        """See `ChosenModel`."""
        return ChosenModel(self.model, self.geometry, self.random_weights)


class ChosenModel:
    """The model that a command line names.

    Raises:
        OptionError: the options contradict each other, or there is no such geometry.
        CheckpointError: there is no such checkpoint, or a damaged one.
    """

    def __init__(self, model: str | None, geometry: str | None, random_weights: bool) -> None:
        from numba_atomflow.checkpoint.find import find_checkpoint
        from numba_atomflow.checkpoint.format import Checkpoint
        from numba_atomflow.model.presets import find_preset

        self._preset = geometry
        self._path: Path | None = None
        if geometry is None:
            if random_weights:
                raise OptionError("--random-weights needs --geometry NAME, the sizes of the model.")
            self._path = find_checkpoint(model or DEFAULT_MODEL)
            with Checkpoint.open(self._path) as checkpoint:
                self.geometry = checkpoint.geometry
            return
        if model is not None:
            raise OptionError(f"There are two models, {model} and the geometry {geometry}; name one.")
        if not random_weights:
            raise OptionError(f"The geometry {geometry} has no weights of its own; add --random-weights.")
        self.geometry = find_preset(geometry)

    @property
    def source(self) -> "Path | ModelGeometry":
        """The checkpoint's path, or a geometry."""
        return self._path or self.geometry

    def open(self, engine_options: options.EngineOptions, max_seq_len: int, draft: str | None = None) -> "Engine":
        """An engine that is ready to run, with a progress bar until then.

        Args:
            draft: a draft model, for a checkpoint only.

        Raises:
            OptionError: --private-copy without a file.
        """
        if self._path is not None:
            return engine_options.load(self._path, max_seq_len, draft)
        if engine_options.private_copy:
            raise OptionError("--private-copy is for a model's file, and random weights have none; leave it out.")
        from numba_atomflow.engine import Engine

        with output.loading_bar() as progress:
            return Engine.random(
                self.geometry,
                engine_options.backend.value,
                max_seq_len,
                engine_options.threads,
                progress,
                decode=engine_options.decode.value,
                name=self._preset or "random",
                prefill=engine_options.prefill.value,
                prefill_chunk=engine_options.prefill_chunk,
                gpus=options.gpus_of(engine_options.gpus),
            )
