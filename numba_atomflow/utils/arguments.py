"""Type checks of arguments of the Python API; numbers may be Python's or NumPy's."""

import math
import numbers
import operator
import os
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote


def whole_number(name: str, value: object) -> int:
    """An `int` from any integer type; 4.0, True and "4" are refused.

    Raises:
        OptionError: it is something else.
    """
    if not _is_truth_value(value):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise OptionError(f"{name} is {quote(value)}; it must be a whole number.")


def whole_numbers(token_ids: Iterable[int]) -> list[int]:
    """Token ids of any integer type, as a list.

    Raises:
        OptionError: one is no whole number, or they are not flat.
    """
    if isinstance(token_ids, str | bytes | Mapping) or not isinstance(token_ids, Iterable):
        raise _no_whole_numbers(token_ids)
    try:
        ids = list(token_ids)
        if all(type(token) is int for token in ids):  # the fast path of a long prompt
            return ids
        return [whole_number("a token", token) for token in ids]
    except (TypeError, OptionError):  # an array without dimensions cannot be iterated over
        raise _no_whole_numbers(token_ids) from None


def _no_whole_numbers(token_ids: object) -> OptionError:
    return OptionError(f"Token ids must be a flat list of whole numbers, not {quote(token_ids)}.")


def one_of(value: object, choices: Container[str]) -> bool:
    """Whether it is one of these texts; an array is none, though NumPy compares it with each."""
    return isinstance(value, str) and value in choices


def real_number(name: str, value: object) -> float:
    """A `float` from any real number but a bool; it may be NaN or infinite.

    Raises:
        OptionError: it is something else.
    """
    if _is_of_numpy(value) and getattr(value, "ndim", None) == 0:
        value = value.item()  # type: ignore[attr-defined]
    if not _is_truth_value(value) and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    raise OptionError(f"{name} is {quote(value)}; it must be a number.")


def truth_value(name: str, value: object) -> bool:
    """A `bool` from Python's or NumPy's.

    Raises:
        OptionError: it is something else.
    """
    if _is_truth_value(value):
        return bool(value)
    raise OptionError(f"{name} is {quote(value)}; it must be True or False.")


def file_path(name: str, value: object) -> Path:
    """A `Path` from a string or an `os.PathLike`.

    Raises:
        OptionError: it is something else, or no valid name of a file.
    """
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text and "\0" not in text:
            with suppress(UnicodeEncodeError):
                os.fsencode(text)
                return Path(text)
    raise OptionError(f"{name} is {quote(value)}; it must be the path of a file, as text or as a Path.")


def _is_truth_value(value: object) -> bool:
    return isinstance(value, bool) or (_is_of_numpy(value) and type(value).__name__ in ("bool", "bool_"))


def _is_of_numpy(value: object) -> bool:
    """By the name of its module, without importing NumPy, which would slow down every start."""
    return type(value).__module__ == "numpy"
