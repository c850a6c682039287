"""Rows of text as a table: aligned for a terminal, Markdown, or CSV."""

import csv
import io
from collections.abc import Sequence
from typing import Literal

Style = Literal["table", "md", "csv"]
Rows = Sequence[Sequence[str]]


def render(style: Style, headers: Sequence[str], rows: Rows) -> str:
    """The table with a newline at its end. Every column but the first is aligned to the right."""
    match style:
        case "csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([headers, *rows])
            return text.getvalue()
        case "md":
            dashes = ["---", *["---:"] * (len(headers) - 1)]
            return "".join("| " + " | ".join(row) + " |\n" for row in (headers, dashes, *rows))
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    lines = []
    for row in (headers, *rows):
        cells = [
            f"{cell:<{width}}" if not i else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
