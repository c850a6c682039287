"""Tables as text: aligned for a terminal, Markdown, or CSV."""

import csv
import io
from collections.abc import Collection, Sequence
from typing import Literal

Style = Literal["table", "md", "csv"]
Rows = Sequence[Sequence[str]]


def render(style: Style, headers: Sequence[str], rows: Rows, text_columns: Collection[int] = (0,)) -> str:
    """A table that ends with a newline.

    Args:
        style: of the table.
        headers: of the columns.
        rows: cells of each row, one per column.
        text_columns: indices of left-aligned columns; the others hold numbers.
    """
    columns = range(len(headers))
    match style:
        case "csv":
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([headers, *rows])
            return text.getvalue()
        case "md":
            dashes = ["---" if i in text_columns else "---:" for i in columns]
            return "".join("| " + " | ".join(row) + " |\n" for row in (headers, dashes, *rows))
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in columns]
    lines = []
    for row in (headers, *rows):
        cells = [row[i].ljust(widths[i]) if i in text_columns else row[i].rjust(widths[i]) for i in columns]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
