"""Where weights come from. `open_source` finds out what a path holds."""

from pathlib import Path

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.base import WeightSource, check_parameters
from numba_atomflow.sources.gguf import GgufSource
from numba_atomflow.sources.gguf_file import MAGIC
from numba_atomflow.sources.huggingface import HuggingFaceSource

__all__ = ["WeightSource", "check_parameters", "open_source"]


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
            raise SourceError(f"{path} does not exist; give a GGUF file or a Hugging Face model folder.")
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
    if not magic:
        raise SourceError(f"{path} is empty; get the file again.")
    if path.suffix == ".safetensors":
        raise SourceError(f"{path} is weights alone; give the model's folder, which also holds config.json.")
    raise SourceError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
