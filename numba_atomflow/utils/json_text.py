"""Strict JSON for other programs.

NaN and infinities, which JSON lacks, become null. Lone surrogates, by which Python represents bytes of file names that
are no text in the locale's encoding, are replaced: many programs refuse them.
"""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """A JSON-ready value: None for NaN and infinities, valid Unicode in all texts."""
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
    """The text with surrogate-escaped bytes decoded as UTF-8, or replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        data = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # surrogates that represent no byte
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return data.decode(errors="replace")


def json_text(record: Any, indent: int | None = None) -> str:
    """A record as JSON text."""
    return json.dumps(finite(record), indent=indent, allow_nan=False)
