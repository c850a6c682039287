"""What the user of ``numba-atomflow chat`` types, or sends through a pipe: messages of one or more lines.

A line that ends in a backslash continues on the next one; lines between two ``\"\"\"`` are one message as they are.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from numba_atomflow import home
from numba_atomflow.cli import output
from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.files.text_input import as_unicode, read_line, read_text_file

PROMPT, CONTINUATION = "> ", "... "
QUOTES = '"""'
HISTORY_LINES = 1000
_EDITORS = ("sensible-editor", "nano", "vi")  # without $VISUAL and $EDITOR


class Entry(NamedTuple):
    """What was typed.

    Attributes:
        text: one or more lines.
        is_literal: of several lines, or in quotes: no command, whatever it begins with.
    """

    text: str
    is_literal: bool


class ChatInput:
    """Reads entries from a terminal or a pipe.

    Args:
        interactive: standard input is a terminal.
    """

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._edits = interactive and sys.stdout.isatty()  # else standard output gets replies only
        self._is_first = True

    def read(self) -> Entry | None:
        """The next entry, without white space around it; None at the end of input.

        Raises:
            TextError: a line of a pipe is not UTF-8.
        """
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return Entry(self._quoted(line.lstrip().removeprefix(QUOTES)), is_literal=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line(CONTINUATION) or "")
        text = "\n".join(lines).strip()
        return Entry(text, is_literal="\n" in text)  # a line has several where readline inserts a pasted text whole

    def _quoted(self, line: str | None) -> str:
        """The lines up to the closing quotes, or to the end of input."""
        lines = []
        while line is not None and not line.rstrip().endswith(QUOTES):
            lines.append(line)
            line = self._line(CONTINUATION)
        if line is not None:
            lines.append(line.rstrip().removesuffix(QUOTES))
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        """The next line without its end, or None at the end of input."""
        try:
            if self._edits:
                return _edited_line(prompt)
            if self._interactive:
                output.say(prompt, end="")
            line = read_line(self._is_first)
            self._is_first = False
            if line:
                return line.removesuffix("\n").removesuffix("\r")
        except EOFError:
            pass
        if self._interactive:
            output.say("")  # so that the shell's prompt begins a line
        return None


def _edited_line(prompt: str) -> str:
    """A line typed at a terminal; an empty one if it is no text."""
    try:
        return as_unicode(input(prompt), "The line", sys.stdin.encoding)
    except (UnicodeDecodeError, TextError):
        output.say("error: The line is not UTF-8 text; set the terminal to UTF-8.")
        return ""


@contextmanager
def line_editing(interactive: bool) -> Iterator[None]:
    """Line editing, and a history that is kept between sessions, if Python has readline."""
    try:
        import readline
    except ImportError:
        interactive = False
    if not interactive:
        yield
        return
    file = home.home() / "chat_history"
    with suppress(OSError):  # no history yet
        readline.read_history_file(file)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):  # a read-only home: no history
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".chat_history.{os.getpid()}")
            readline.write_history_file(partial)
            partial.replace(file.resolve())


def edit_text(text: str) -> str:
    """The text after the user has changed it in $VISUAL or $EDITOR.

    Raises:
        OptionError: there is no editor, or it failed.
        TextError: the result is not UTF-8.
    """
    command = _editor()
    with tempfile.TemporaryDirectory(prefix="numba-atomflow-") as folder:
        file = Path(folder) / "message.md"
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            with _ctrl_c_ignored():  # it is the editor's
                code = subprocess.run([*command, str(file)], check=False).returncode  # noqa: S603 - the user's own choice
        except OSError as error:
            raise OptionError(f"{command[0]} cannot be started ({error.strerror}); set EDITOR to an editor.") from error
        if code:
            raise OptionError(f"{command[0]} ended with code {code}; nothing was sent.")
        return read_text_file(file)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C in this process; programs that it starts do not inherit that."""
    before = signal.signal(signal.SIGINT, lambda _signal, _frame: None)  # SIG_IGN would be inherited
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _editor() -> list[str]:
    for name in ("VISUAL", "EDITOR"):
        if command := os.environ.get(name, "").strip():
            try:
                return shlex.split(command)
            except ValueError as error:
                raise OptionError(f"{name} is not a command ({error}); set it to an editor.") from error
    for name in _EDITORS:
        if shutil.which(name):
            return [name]
    raise OptionError("There is no editor; set EDITOR to one.")
