"""The interface of weight sources, and checks that all of them use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import GeometryError, SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.geometry import ModelGeometry, layers_fit
from numba_atomflow.text.codec import TextAssets

MAX_WEIGHT = 65504.0  # the largest float16
# Incremented when the same files give different tokens than before; stored in checkpoints.
TEXT_RULES = 2
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SLAB_VALUES = 1 << 20  # per slab: 4 MB in float32


class WeightSource(Protocol):
    """A model on disk: geometry, text assets, and tensors that are read one at a time.

    Names, shapes and row order are those of Hugging Face, as in `ModelGeometry.parameters`.
    """

    path: Path
    kind: str  # "gguf" or "hf"
    geometry: ModelGeometry
    text: TextAssets
    fp8_scheme: str | None  # description of the FP8 weights; None: the model has none
    files: tuple[Path, ...]  # all files of the source
    # Ignored settings of the source, one complete sentence each, including those of `text`.
    warnings: tuple[str, ...]

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor: [N, K] of a matrix, [N] of a vector."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor (elements of a vector), dequantized.

        Raises:
            SourceError: the file cannot be read, or the tensor holds a NaN or an infinity.
        """

    def read_fp8(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]] | None:
        """The same rows as codes uint8 [n, K] and group scales float32 [n, ceil(K / 128)]; None if not stored in FP8.

        `read` returns ``code * scale``.

        Raises:
            SourceError: the file cannot be read, or holds a NaN or an invalid scale.
        """


def slabs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges of at most `SLAB_VALUES` values, but at least one row."""
    step = max(1, SLAB_VALUES // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


@contextmanager
def described_by(path: Path) -> Iterator[None]:
    """Add the path of the description to geometry errors."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(f"{path} describes a model that cannot be run: {error}") from error


def check_parameters(path: Path, geometry: ModelGeometry, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that `shapes` has exactly the parameters of `geometry`, with their shapes.

    Raises:
        SourceError: names the first missing, misshapen or unknown tensor.
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
                f"Tensor {name} of {path} has shape {quote(tuple(shapes[name]))}, but the model's description says "
                f"{shape}."
            )
    for name in shapes:
        if name not in expected:
            raise SourceError(
                f"{path} holds the tensor {short(name)}, which is not part of a model of this description."
            )


def check_finite(path: Path, name: str, values: NDArray[np.float32]) -> None:
    """Reject weights with a NaN, an infinity or a value beyond float16.

    Trained weights are far below the limit, and kernels rely on group scales below 2^8 (see `ops/fp8.py`).

    Raises:
        SourceError: names file and tensor.
    """
    if not np.isfinite(values).all():
        raise SourceError(f"Tensor {name} of {path} holds a NaN or an infinity; the file is damaged, get it again.")
    if values.size and np.abs(values).max() > MAX_WEIGHT:
        raise SourceError(
            f"Tensor {name} of {path} holds {np.abs(values).max():.3g}, beyond {MAX_WEIGHT:.0f}, which no trained "
            "weight is; the file is damaged, get it again."
        )


def refuse_lfs_pointer(path: Path) -> None:
    """Reject a Git LFS pointer file, which git checks out in place of a large file without git-lfs.

    Raises:
        SourceError: `path` is a pointer file. (An unreadable file is reported by its reader.)
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise SourceError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or get the "
                "file from the hub."
            )


def read_bytes(path: Path, offset: int, count: int) -> NDArray[np.uint8]:
    """Read `count` bytes of a file at `offset`; not by a mapping, which would keep the whole source resident.

    Raises:
        SourceError: the file cannot be read, or was truncated.
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
