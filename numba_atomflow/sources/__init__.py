"""Where weights come from. `open_source` finds out what a path holds."""

from pathlib import Path

from numba_atomflow import home
from numba_atomflow.errors import OptionError, SourceError
from numba_atomflow.sources.base import WeightSource, check_parameters, refuse_pointer
from numba_atomflow.sources.gguf import GgufSource
from numba_atomflow.sources.gguf_file import MAGIC
from numba_atomflow.sources.hub import HubModel, fetch
from numba_atomflow.sources.huggingface import HuggingFaceSource
from numba_atomflow.utils.progress import Progress

__all__ = ["WeightSource", "check_parameters", "local_source", "open_source"]


def local_source(name: Path | str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """Where a source is on this machine: `name` itself, if it is there, else what the hub has under that name.

    Args:
        name: a GGUF file, a Hugging Face folder, or a model of the hub: ``org/name`` or ``org/name/file.gguf``.
        revision: of a model of the hub: branch, tag or commit.
        progress: called with what is being fetched, bytes done and bytes in all.

    Raises:
        HubError: it can only be meant for the hub, and cannot be fetched from there.
        OptionError: a revision of what is on this machine.
    """
    path = home.expand_user(name)
    model = HubModel.parse(str(name), revision)
    if model is not None and not path.exists():
        return fetch(model, progress)
    if revision is not None:
        raise OptionError(
            f"--revision is for models of the hub (org/name), and {name} is not one of them; leave it out."
        )
    return path


def open_source(path: Path) -> WeightSource:
    """Open a GGUF file or a Hugging Face folder: headers and descriptions are read and checked, weights are not.

    Raises:
        SourceError: nothing that can be read is there, or it is damaged or of an unknown architecture.
        GeometryError: it describes a model that cannot be run.
    """
    try:
        if path.is_dir():
            return HuggingFaceSource(path)
        if not path.exists():
            raise SourceError(
                f"{path} does not exist; give a GGUF file, a Hugging Face folder, or a model of the hub (org/name)."
            )
        if not path.is_file():
            raise SourceError(
                f"{path} is neither a file nor a folder; give a GGUF file or a Hugging Face model folder."
            )
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    if magic == MAGIC:
        return GgufSource(path)
    refuse_pointer(path)
    if not magic:
        raise SourceError(f"{path} is empty; get the file again.")
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} is weights alone; give the model's folder, which also holds config.json.")
    raise SourceError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
