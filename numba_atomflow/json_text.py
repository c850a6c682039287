"""JSON that other programs read: numbers that are none (NaN, infinities), for which JSON has no words, become null."""

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """A JSON-ready value with None for every float that is no finite number."""
    match value:
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def json_text(record: Any, indent: int | None = None) -> str:
    """A record as JSON text."""
    return json.dumps(finite(record), indent=indent, allow_nan=False)
