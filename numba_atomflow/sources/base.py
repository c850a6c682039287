"""What every source of weights offers, and the checks that all of them share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import GeometryError, SourceError
from numba_atomflow.files.untrusted import short, shown
from numba_atomflow.geometry import ModelGeometry, layers_fit
from numba_atomflow.text.codec import TextAssets

LARGEST_WEIGHT = 65504.0  # the largest float16
# Raised when the same files give other tokens than they gave before; a checkpoint says with which it was made.
TEXT_RULES = 2
_POINTER = b"version https://git-lfs.github.com/spec/"
VALUES_AT_ONCE = 1 << 20  # weights dequantised at once: 4 MB in float32


class WeightSource(Protocol):
    """A model on disk, whatever its format: geometry, text assets, and its tensors one at a time.

    Names, shapes and the order of rows are those of `ModelGeometry.parameters`, that is of Hugging Face.
    """

    path: Path
    kind: str  # "gguf" or "hf"
    geometry: ModelGeometry
    text: TextAssets
    fp8_scheme: str | None  # of the weights that are FP8 already, in words; None: there are none
    files: tuple[Path, ...]  # everything that the source was read from
    # Sentences for the user about what was not followed, those of `text` included. Each is whole: it names the file.
    warnings: tuple[str, ...]

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of one tensor (elements, if it is a vector), read now and dequantised.

        Raises:
            SourceError: the file cannot be read, or the tensor holds a NaN or an infinity.
        """

    def read_fp8(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """The same rows as codes uint8 [n, K] and group scales float32 [n, ceil(K / 128)]; None if they are not FP8.

        `read` gives ``code * scale`` of them.

        Raises:
            SourceError: the file cannot be read, or holds a NaN, or a scale that cannot be one.
        """


def slabs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together are all, each of at most `VALUES_AT_ONCE` values or one row."""
    step = max(1, VALUES_AT_ONCE // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Within it, errors of a geometry name the file that described the model."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(f"{path} describes a model that cannot be run: {error}") from error


def check_parameters(path: Path, geometry: ModelGeometry, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter of `geometry` is in `shapes`, with its shape, and nothing else is.

    Raises:
        SourceError: naming the first tensor that is missing, misshapen or unknown.
    """
    if not layers_fit(geometry, len(shapes)):
        raise SourceError(f"{path} describes {geometry.layers} layers but holds only {len(shapes)} tensors.")
    expected = geometry.parameters()
    missing = [name for name in expected if name not in shapes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = ""
        if missing == ["lm_head.weight"]:
            hint = " (if the embeddings are shared, config.json must say tie_word_embeddings: true)"
        raise SourceError(f"{path} lacks the tensor {missing[0]}{more}{hint}; get the complete model.")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise SourceError(
                f"Tensor {name} of {path} has shape {shown(tuple(shapes[name]))}, but the model's description says "
                f"{shape}."
            )
    for name in shapes:
        if name not in expected:
            raise SourceError(
                f"{path} holds the tensor {short(name)}, which is not part of a model of this description."
            )


def check_finite(path: Path, name: str, values: NDArray[np.float32]) -> None:
    """A NaN, an infinity or a value beyond float16 in weights is refused: nothing sensible can be computed from it.

    No trained weight comes near the limit; and kernels may count on group scales below 2^8 (see `ops/fp8.py`).

    Raises:
        SourceError: naming file and tensor.
    """
    if not np.isfinite(values).all():
        raise SourceError(f"Tensor {name} of {path} holds a NaN or an infinity; the file is damaged, get it again.")
    if values.size and np.abs(values).max() > LARGEST_WEIGHT:
        raise SourceError(
            f"Tensor {name} of {path} holds {np.abs(values).max():.3g}, beyond {LARGEST_WEIGHT:.0f}, which no trained "
            "weight is; the file is damaged, get it again."
        )


def refuse_pointer(path: Path) -> None:
    """Refuse what git leaves of a large file where git-lfs is not installed: a few lines that say where it is.

    Raises:
        SourceError: `path` is such a file. (One that cannot be read is for the reader to tell.)
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise SourceError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or get the "
                "file from the hub."
            )


def read_bytes(path: Path, offset: int, count: int) -> NDArray[np.uint8]:
    """`count` bytes of a file from `offset`, by a plain read: a mapping would keep the whole source resident.

    Raises:
        SourceError: the file cannot be read or has become shorter than its header said.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = np.fromfile(file, np.uint8, count)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error
    if data.size != count:
        raise SourceError(f"{path} became shorter while it was read; get the file again.")
    return data
