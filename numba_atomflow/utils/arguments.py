"""What callers of the Python API pass, checked by type before it is compared: numbers of Python and of NumPy alike."""

import math
import numbers
import operator
import os
from contextlib import suppress
from pathlib import Path

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import shown


def whole_number(name: str, value: object) -> int:
    """An `int`, of anything that is a whole number by its type: not 4.0, and neither True nor "4".

    Raises:
        OptionError: it is something else.
    """
    if not _is_truth_value(value):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise OptionError(f"{name} is {shown(value)}; it must be a whole number.")


def real_number(name: str, value: object) -> float:
    """A `float`, of any real number but a bool; it may be a NaN or an infinity.

    Raises:
        OptionError: it is something else, or too large for a float.
    """
    if _is_of_numpy(value) and getattr(value, "ndim", None) == 0:
        value = value.item()  # type: ignore[attr-defined]
    if not _is_truth_value(value) and isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf  # type: ignore[operator]
    raise OptionError(f"{name} is {shown(value)}; it must be a number.")


def truth_value(name: str, value: object) -> bool:
    """A `bool`, of Python or NumPy.

    Raises:
        OptionError: it is something else.
    """
    if _is_truth_value(value):
        return bool(value)
    raise OptionError(f"{name} is {shown(value)}; it must be True or False.")


def file_path(name: str, value: object) -> Path:
    """A `Path`, of a string or of anything that stands for a path.

    Raises:
        OptionError: it is something else, or what no file can be called.
    """
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and text and "\0" not in text:
            with suppress(UnicodeEncodeError):
                os.fsencode(text)
                return Path(text)
    raise OptionError(f"{name} is {shown(value)}; it must be the path of a file, as text or as a Path.")


def _is_truth_value(value: object) -> bool:
    return isinstance(value, bool) or (_is_of_numpy(value) and type(value).__name__ in ("bool", "bool_"))


def _is_of_numpy(value: object) -> bool:
    """By the name of its module: importing NumPy would make every command's start slower, ``--help`` included."""
    return type(value).__module__ == "numpy"
