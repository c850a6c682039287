"""JSON that other programs read.

JSON has no words for NaN and infinities, which become null; and many programs refuse halves of surrogate pairs, by
which Python stands for the bytes of a file's name where they are no text in the locale's encoding.
"""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """A JSON-ready value with None for every float that is no finite number, and all texts valid Unicode."""
    match value:
        case str():
            return _valid(value)
        case dict():
            return {finite(key): finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _valid(text: str) -> str:
    """The text; what is no Unicode in it as UTF-8 if its bytes are that, else as U+FFFD."""
    if text.isascii():
        return text
    try:
        data = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # halves that stand for no byte
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return data.decode(errors="replace")


def json_text(record: Any, indent: int | None = None) -> str:
    """A record as JSON text."""
    return json.dumps(finite(record), indent=indent, allow_nan=False)
