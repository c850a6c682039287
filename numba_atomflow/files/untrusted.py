"""Untrusted input: JSON parsed within limits, and values from files made safe for messages.

A file may contain integers of 5,000 digits, which Python refuses to print, or names of a megabyte. So messages take
values from files through `quote` or `short`, and JSON is parsed by `load_json`.
"""

import json
import re
import reprlib
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # as a JSON escape, or as a character
_WHITE_LINES = re.compile(r"\s*\n\s*")
MOST_DIGITS = 1000  # of an integer in JSON; Python converts no more than 4,300
_LONGEST = 80  # characters of a value in a message

# Control characters (C0 but tab and newline, DEL, C1), line and paragraph separators, and bidirectional controls.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def load_json(text: str | bytes, *, unique: bool = False) -> Any:
    """A JSON text as Python values.

    Args:
        text: the whole text; bytes are UTF-8, -16 or -32.
        unique: refuse an object with a duplicate name; otherwise its last value counts.

    Raises:
        ValueError: with a short message: it is malformed, nested too deeply, or holds an integer of more than
            `MOST_DIGITS` digits, or half of a surrogate pair, which cannot be encoded later.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        values = json.loads(text, parse_int=_integer, object_pairs_hook=_without_duplicates if unique else None)
        if _SURROGATE.search(text):  # rare: emoji in JSON written in ASCII
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except UnicodeDecodeError as error:  # a shorter message than the error's own
        raise ValueError(f"byte {error.start} is not {error.encoding}") from None


def quote(value: object) -> str:
    """A value of any type for a message: its `repr` on one line, cut to a few dozen characters."""
    return _cut(_WHITE_LINES.sub(" ", _REPR.repr(value)))


def short(text: str) -> str:
    """A name or another text for a message, without quotes: one line of printable characters, cut if it is long."""
    text = text[: _LONGEST + 1]
    return _cut(text if text.isprintable() else repr(text)[1:-1])


def escape_controls(text: str) -> str:
    r"""A text that is safe for a terminal: control characters are escaped, an escape character as \x1b."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def characters_of_xml(text: str) -> str:
    r"""A text that XML and HTML may hold: other characters are escaped, a lone surrogate of a file name as \udc80."""
    return _NOT_IN_XML.sub(lambda found: found[0].encode("unicode_escape").decode(), escape_controls(text))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{short(name)} is listed twice")
            seen.add(name)
    return record


class _Repr(reprlib.Repr):
    """`repr` of a few items of a container, and never of all digits of an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _LONGEST
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4 * MOST_DIGITS else f"<{x.bit_length()} bits>"


_REPR = _Repr()
