"""Bounds checks of indices on the host, before a step: kernels do not check.

A failure is a bug of this program; files and options are validated elsewhere.
"""

from collections.abc import Sequence
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


def check_tokens(tokens: Sequence[int], vocabulary: int) -> None:
    """Raises:
    IndexError: a token is not in 0 .. vocabulary - 1.
    """
    if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocabulary:  # of a list, faster than NumPy's
        raise IndexError(f"tokens {min(tokens)} to {max(tokens)} of {vocabulary}")
