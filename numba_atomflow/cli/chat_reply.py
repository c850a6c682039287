"""A reply on its way out: on a terminal its reasoning is folded into one dim line; a pipe gets everything unchanged."""

import os
import sys

from numba_atomflow.cli import output
from numba_atomflow.text.reasoning import Piece, ReasoningSplitter

_DIM, _PLAIN, _LINE_START = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


class ReplyWriter:
    """Writes pieces of one reply.

    Args:
        raw_output: control characters of the reply are written to the terminal, not escaped.
        opened: the prompt has opened the reasoning.
        show_reasoning: write the reasoning instead of folding it.
    """

    def __init__(self, raw_output: bool, opened: bool, show_reasoning: bool) -> None:
        self._write = output.reply_writer(raw_output)
        self._splitter = ReasoningSplitter(opened) if sys.stdout.isatty() else None
        self._show = show_reasoning
        self._styled = _has_styles()
        self._reasoning_tokens = 0  # 0: no reasoning yet, or no more
        self._ends_line = False

    def push(self, text: str, tokens: int) -> None:
        """Write a piece of the reply.

        Args:
            tokens: of the reply so far.
        """
        if self._splitter is None:
            self._write_text(text)
            return
        for piece in self._splitter.push(text):
            self._add(piece, tokens)

    def end(self) -> None:
        """Write the rest, and end the line."""
        for piece in self._splitter.flush() if self._splitter else ():
            self._add(piece, self._reasoning_tokens)
        self._end_reasoning()
        if not self._ends_line:
            self._write_text("\n")

    def _add(self, piece: Piece, tokens: int) -> None:
        if not piece.is_reasoning:
            self._end_reasoning()
            self._write_text(piece.text)
            return
        self._reasoning_tokens = tokens
        if self._show:
            self._styles(_DIM)
            self._write_text(piece.text)
            self._styles(_PLAIN)
        else:
            self._styles(f"{_LINE_START}{_DIM}[reasoning: {tokens} tokens]{_PLAIN}")

    def _end_reasoning(self) -> None:
        """The line that stands for the reasoning; or, where that is shown, an empty line after it."""
        if not self._reasoning_tokens:
            return
        if self._show:
            self._styles(_PLAIN)  # Ctrl-C may have come in the middle of a piece
            self._write_text("\n\n" if not self._ends_line else "\n")
        else:
            self._styles(f"{_LINE_START}{_DIM}")
            output.emit(f"[reasoning of {self._reasoning_tokens} tokens; /think shows it]\n")
            self._styles(_PLAIN)
            self._ends_line = True
        self._reasoning_tokens = 0

    def _write_text(self, text: str) -> None:
        self._write(text)
        self._ends_line = text.endswith("\n")

    def _styles(self, codes: str) -> None:
        if self._styled:
            output.emit(codes, raw=True)


def _has_styles() -> bool:
    """Whether standard output is a terminal that understands colours, and the user wants them (no-color.org)."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
