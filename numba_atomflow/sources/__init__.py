"""Readers of model weights: GGUF files and Hugging Face folders, local or from the hub."""

from pathlib import Path

from numba_atomflow import home
from numba_atomflow.errors import OptionError, SourceError
from numba_atomflow.sources.base import WeightSource, check_parameters, refuse_lfs_pointer
from numba_atomflow.sources.gguf import GgufSource
from numba_atomflow.sources.gguf_file import MAGIC
from numba_atomflow.sources.hub import HubModel, fetch
from numba_atomflow.sources.huggingface import HuggingFaceSource
from numba_atomflow.utils.progress import Progress

__all__ = ["WeightSource", "check_parameters", "local_source", "open_source"]


def local_source(name: Path | str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The local path of a source: `name` if it exists, else the download of the hub model of that name.

    Args:
        name: a GGUF file, a Hugging Face folder, or a model of the hub: ``org/name`` or ``org/name/file.gguf``.
        revision: of a model of the hub: branch, tag or commit.
        progress: called with the name of the file, bytes done and total bytes.

    Raises:
        HubError: `name` is a hub model that cannot be downloaded.
        OptionError: a revision with a local path.
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
    """Open a GGUF file or a Hugging Face folder; reads and validates metadata, not weights.

    Raises:
        SourceError: the path is missing, unreadable, damaged, or of an unsupported architecture.
        GeometryError: the geometry is not supported.
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
    refuse_lfs_pointer(path)
    if not magic:
        raise SourceError(f"{path} is empty; get the file again.")
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} holds only weights; give the model's folder, which also holds config.json.")
    raise SourceError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
