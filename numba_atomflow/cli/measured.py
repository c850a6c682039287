"""What `bench` and `profile` measure: a checkpoint, or a well-known geometry with random weights."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.cli import options, output
from numba_atomflow.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from numba_atomflow.engine import Engine
    from numba_atomflow.geometry import ModelGeometry
    from numba_atomflow.perf.bench import BenchReport
    from numba_atomflow.perf.profile import ProfileReport

_PRESETS = "llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, smollm2-135m"  # not imported: --help must not wait for NumPy

Model = Annotated[
    str | None,
    typer.Argument(
        help=f"A checkpoint file, or the name of one in the models folder.  [default: {DEFAULT_MODEL}]",
        show_default=False,
    ),
]
Geometry = Annotated[
    str | None,
    typer.Option("--geometry", metavar="NAME", help=f"Instead of a model, one of {_PRESETS}."),
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="With --geometry: nothing is downloaded, the text is nonsense.")
]


class Format(StrEnum):
    """What may be given for --format."""

    TABLE = "table"
    MD = "md"
    CSV = "csv"
    JSON = "json"


Form = Annotated[Format, typer.Option("--format", "-f", help="How to print the result.")]


class Measured:
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

    def open(
        self, backend: options.BackendChoice, max_seq_len: int, threads: int | None, decode: options.DecodeChoice
    ) -> "Engine":
        """An engine that is ready to run, with a bar on the way there."""
        from numba_atomflow.engine import Engine

        with output.loading_bar() as progress:
            if self._path is not None:
                return Engine.load(self._path, backend.value, max_seq_len, threads, progress, decode=decode.value)
            return Engine.random(
                self.geometry,
                backend.value,
                max_seq_len,
                threads,
                progress,
                decode=decode.value,
                name=self._preset or "random",
            )


def headline(report: "BenchReport | ProfileReport") -> list[str]:
    """What was measured, on what, and how fast its memory is: a line each."""
    machine = report.machine
    driver = machine["nvidia_driver"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return [
        f"model: {report.model}" + (", random weights" if report.random_weights else ""),
        f"device: {report.device}, {report.backend} backend",
        *([] if report.decode is None else [f"decode: {report.decode}"]),
        f"machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}"
        + (f", NVIDIA driver {driver} (CUDA {machine['cuda_driver']})" if driver else ""),
        f"versions: {versions}",
        f"commit: {machine['commit'] or 'installed package'}, {report.date}",
        "ceilings in this run: " + ", ".join(f"{name} {speed:.1f} GB/s" for name, speed in report.ceilings.items()),
    ]
