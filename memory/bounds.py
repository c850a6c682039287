"""Whether indices lead into a tensor: asked on the host before a step, whose kernels do not ask.

Who fails here has found a mistake of this program: files and options are checked elsewhere, and refused in a sentence.
"""

from typing import Any

from numpy.typing import NDArray


def check_range(what: str, first: int, count: int, limit: int) -> None:
    """Raises:
    IndexError: first .. first + count - 1 are not all in 0 .. limit - 1.
    """
    if first < 0 or count < 0 or first + count > limit:
        raise IndexError(f"{what} {first} to {first + count - 1} of {limit}")


def check_indices(what: str, indices: NDArray[Any], limit: int) -> None:
    """Raises:
    IndexError: an index is not in 0 .. limit - 1.
    """
    if indices.size and not 0 <= indices.min() <= indices.max() < limit:
        raise IndexError(f"{what} {indices.min()} to {indices.max()} of {limit}")
