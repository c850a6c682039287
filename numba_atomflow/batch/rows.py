"""The rows of a batch: one JSON object each, from a JSON Lines file or from Python."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.files.untrusted import load_json, quote

MOST_LINE_BYTES = 1 << 26  # of a file; a device such as /dev/zero has one line without end


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        line: its line in the file, or its number, from 1.
        id: the row's `id`, or its line if it has none; None for a row that is malformed.
        fields: the others.
        error: what is wrong with it; such a row does not run.
    """

    line: int
    id: str | int | None
    fields: Mapping[str, Any]
    error: str | None = None


def read_rows(source: object) -> list[Row]:
    """All rows, in order. One that is malformed, or has the id of an earlier one, carries an error.

    Args:
        source: a JSON Lines file in UTF-8, whose blank lines are skipped; or mappings of plain data.

    Raises:
        TextError: the file cannot be read, or has a line that is too long.
        OptionError: there are no rows, or `source` is neither.
    """
    rows: list[Row] = []
    lines: dict[str | int | None, int] = {}  # of each id
    for line, text in _texts(source):
        try:
            row = _row(line, text)
        except OptionError as error:
            rows.append(Row(line, None, {}, str(error)))
            continue
        first = lines.setdefault(row.id, line)
        if first != line:
            row = Row(line, row.id, {}, f"The id {quote(row.id)} is also that of row {first}; give each its own.")
        rows.append(row)
    if not rows:
        raise OptionError("There are no rows; give at least one, a JSON object on one line.")
    return rows


def _texts(source: object) -> Iterator[tuple[int, str | bytes]]:
    if isinstance(source, Path):
        yield from _lines(source)
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes | Mapping):
        for number, values in enumerate(source, 1):
            yield number, _as_json(number, values)
    else:
        raise OptionError(f"rows is {quote(source)}; give the Path of a JSON Lines file, or mappings.")


def _as_json(number: int, values: Any) -> str:
    try:
        return json.dumps(dict(values), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"Row {number} is no mapping of plain data ({error}); give what JSON can hold.") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number in itertools.count(1):
                line = file.readline(MOST_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MOST_LINE_BYTES:
                    raise TextError(
                        f"Line {number} of {path} has more than {MOST_LINE_BYTES >> 20} MiB; write one JSON object on "
                        "each line."
                    )
                line = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
                if line:
                    yield number, line
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from error


def _row(line: int, text: str | bytes) -> Row:
    """A row from its JSON.

    Raises:
        OptionError: it is no JSON object, or its id is none.
    """
    try:
        fields = load_json(text, unique=True)
    except ValueError as error:
        raise OptionError(f"The row is not JSON ({error}); write one JSON object on one line.") from None
    if not isinstance(fields, dict):
        raise OptionError(f"The row is {quote(fields)}; it must be a JSON object.")
    given = fields.pop("id", line)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise OptionError(f"id is {quote(given)}; it must be a text or a whole number.")
    return Row(line, given, fields)
