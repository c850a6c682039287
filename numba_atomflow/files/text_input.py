"""Text input from files, standard input and arguments: UTF-8 in every locale.

A byte order mark before UTF-8, as editors on Windows write it, is dropped; UTF-16 is refused in a sentence.
"""

import codecs
import sys
from pathlib import Path
from typing import BinaryIO

from numba_atomflow.errors import TextError

MOST_BYTES = 1 << 28  # of a text; a device such as /dev/zero has no end

_OTHER_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def decode_text(data: bytes, origin: str) -> str:
    """Bytes of a text in UTF-8, without a byte order mark at the beginning.

    Args:
        data: the whole text, or its beginning.
        origin: its name in a message: a path, or "Standard input".

    Raises:
        TextError: it is not UTF-8.
    """
    for mark, name in _OTHER_MARKS:
        if data.startswith(mark):
            raise TextError(f"{origin} is {name}, not UTF-8 text; convert it to UTF-8.")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(f"{origin} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error


def read_text_file(path: Path, what: str = "") -> str:
    """A text file in UTF-8.

    Args:
        path: the file.
        what: words before the path in a message.

    Raises:
        TextError: it cannot be read, is too long, or is not UTF-8.
    """
    origin = f"{what} {path}".lstrip()
    try:
        with path.open("rb") as file:
            return decode_text(_read_all(file, origin), origin)
    except OSError as error:
        raise TextError(f"{origin} cannot be read ({error.strerror}); check the path and its permissions.") from error


def read_standard_input() -> str:
    """All of standard input.

    Raises:
        TextError: it cannot be read, is too long, or is not UTF-8.
    """
    origin = "Standard input"
    try:
        return decode_text(_read_all(sys.stdin.buffer, origin), origin)
    except OSError as error:
        raise TextError(f"{origin} cannot be read ({error.strerror}); give a file or a pipe.") from error


def read_line(first: bool) -> str:
    """The next line of standard input with its end; "" at the end of the file.

    Args:
        first: it is the first line, which may begin with a byte order mark.

    Raises:
        TextError: it cannot be read, is too long, or is not UTF-8.
    """
    origin = "Standard input"
    if not hasattr(sys.stdin, "buffer"):  # replaced by a text stream
        return sys.stdin.readline()
    try:
        line = sys.stdin.buffer.readline(MOST_BYTES + 1)
    except OSError as error:
        raise TextError(f"{origin} cannot be read ({error.strerror}); give a file or a pipe.") from error
    _check_length(line, origin)
    return decode_text(line, origin) if first else decode_text(b"\n" + line, origin)[1:]


def as_unicode(text: str, origin: str, encoding: str | None = None) -> str:
    """An argument or a terminal's line as Unicode: Python decodes both by the locale's encoding.

    In a locale of another encoding, bytes that are valid UTF-8 are decoded as UTF-8; other text is rarely valid UTF-8.

    Args:
        text: as Python decoded it.
        origin: its name in a message: "The prompt".
        encoding: by which it was decoded; by default that of arguments.

    Raises:
        TextError: it is no text, in UTF-8 or in the locale's encoding.
    """
    if text.isascii():
        return text
    try:
        data = text.encode(encoding or sys.getfilesystemencoding(), "surrogateescape")
        return data.decode()
    except UnicodeDecodeError as error:
        if any("\ud800" <= character <= "\udfff" for character in text):
            message = f"{origin} is not UTF-8 text (byte {error.start}); give it in UTF-8."
            raise TextError(message) from error
        return text
    except UnicodeEncodeError:  # it was decoded by another encoding
        return text


def _read_all(file: BinaryIO, origin: str) -> bytes:
    data = file.read(MOST_BYTES + 1)
    _check_length(data, origin)
    return data


def _check_length(data: bytes, origin: str) -> None:
    if len(data) > MOST_BYTES:
        raise TextError(f"{origin} has more than {MOST_BYTES >> 20} MiB; give a shorter text.")
