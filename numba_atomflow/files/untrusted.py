"""What comes from a file that somebody else wrote: read within limits, and shown within limits.

A file may claim anything. A number of 5,000 digits cannot even be printed (`int` refuses), a name may have a megabyte,
and a message that repeats it all helps nobody; so whatever a message takes over from a file goes through `shown` or
`short`, and JSON comes in through `load_json`.
"""

import json
import re
import reprlib
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")  # in JSON's own spelling, or bare
_WHITE_LINES = re.compile(r"\s*\n\s*")
MOST_DIGITS = 1000  # of an integer in JSON; Python converts no more than 4,300
_LONGEST = 80  # characters of a value in a message

# What a terminal obeys instead of showing it: control characters (C0 but tab and newline, DEL, C1), line and paragraph
# separators, and what turns the order of the characters that follow.
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def load_json(text: str | bytes, *, unique: bool = False) -> Any:
    """A JSON text as Python values.

    Args:
        text: the whole text; bytes are UTF-8, -16 or -32.
        unique: refuse an object that lists a name twice; otherwise the last one holds.

    Raises:
        ValueError: with a short message: it is malformed, nested too deeply, or holds an integer of more than
            `MOST_DIGITS` digits, or half of a surrogate pair, which nothing can encode later.
    """
    try:
        text = text if isinstance(text, str) else text.decode(json.detect_encoding(text))
        values = json.loads(text, parse_int=_integer, object_pairs_hook=_without_duplicates if unique else None)
        if _SURROGATE.search(text):  # few texts have them: emoji in what was written in ASCII
            json.dumps(values, ensure_ascii=False).encode()
        return values
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except UnicodeDecodeError as error:  # its own message holds the whole text's encoding alone, but not where
        raise ValueError(f"byte {error.start} is not {error.encoding}") from None


def shown(value: object) -> str:
    """A value for a message: its `repr` on one line, cut to a few dozen characters, whatever it is."""
    return _cut(_WHITE_LINES.sub(" ", _REPR.repr(value)))


def short(text: str) -> str:
    """A name or another text for a message, without quotes: one line of printable characters, cut where it is long."""
    text = text[: _LONGEST + 1]
    return _cut(text if text.isprintable() else repr(text)[1:-1])


def visible(text: str) -> str:
    r"""A text as a terminal may show it: what would be a command to it is spelt out, an escape character as \x1b."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


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
    """Looks at a few items of a container, and never at all digits of an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _LONGEST
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4 * MOST_DIGITS else f"<{x.bit_length()} bits>"


_REPR = _Repr()
