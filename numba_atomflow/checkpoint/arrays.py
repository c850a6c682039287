"""A model's weights as a mapping from names to arrays."""

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from numba_atomflow.checkpoint.format import TOKENIZER, Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.utils.repeated import RepeatedBytes


class WeightArrays(Mapping[str, NDArray[Any]]):
    """The weights of a checkpoint by name. An array is mapped, or generated, each time it is looked up."""

    def __init__(self, checkpoint: Checkpoint | RandomModel) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(name for name in checkpoint.names() if name != TOKENIZER)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._checkpoint.array(name)

    def repeated(self, name: str) -> RepeatedBytes | None:
        """The array of this name, if it is random codes, as a part of their pool; else None."""
        return self._checkpoint.codes(name) if isinstance(self._checkpoint, RandomModel) else None

    def release(self, name: str) -> None:
        """The array of this name has been copied elsewhere, and its memory is not needed any more."""
        if isinstance(self._checkpoint, Checkpoint):
            self._checkpoint.release(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
