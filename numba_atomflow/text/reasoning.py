"""Reasoning in a reply: what a model writes between ``<think>`` and ``</think>`` before it answers.

Only at the beginning of a reply: tags further on belong to the answer. Some chat templates write the opening tag
themselves, at the end of the prompt; then a reply begins inside its reasoning.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

OPENING, CLOSING = "<think>", "</think>"


def prompt_opening(prompt: str) -> str:
    """The end of a prompt that opens the reply's reasoning, from the tag on; "" if none does."""
    text = prompt.rstrip()
    return prompt[len(text) - len(OPENING) :] if text.endswith(OPENING) else ""


class Piece(NamedTuple):
    """A piece of a reply, not empty."""

    text: str
    is_reasoning: bool


class ReasoningSplitter:
    """Separates reasoning from answer in a text that comes in pieces. Tags and the white space beside them are dropped.

    Args:
        opened: the prompt ends with the opening tag.
    """

    def __init__(self, opened: bool = False) -> None:
        self._place: Literal["start", "reasoning", "between", "answer"] = "reasoning" if opened else "start"
        self._held = ""  # of which it is not certain yet what it is
        self._reasoned = False  # whether reasoning was returned

    def push(self, text: str) -> Iterator[Piece]:
        """Add text; the pieces that are certain now."""
        self._held += text
        if self._place == "start":
            self._find_opening()
        if self._place == "reasoning":
            yield from self._reasoning()
        if self._place == "between":
            self._held = self._held.lstrip()
            self._place = "answer" if self._held else "between"
        if self._place == "answer" and self._held:
            yield Piece(self._held, is_reasoning=False)
            self._held = ""

    def flush(self) -> Iterator[Piece]:
        """The rest, at the end of the reply."""
        if self._place == "reasoning":
            yield from self._reasoning_piece(self._held.rstrip())
        elif self._held and self._place != "between":
            yield Piece(self._held, is_reasoning=False)
        self._held = ""

    def _find_opening(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPENING):
            self._held, self._place = text.removeprefix(OPENING), "reasoning"
        elif not OPENING.startswith(text):
            self._place = "answer"

    def _reasoning(self) -> Iterator[Piece]:
        """What is certainly reasoning; text after the closing tag stays held."""
        before, tag, after = self._held.partition(CLOSING)
        if tag:
            yield from self._reasoning_piece(before.rstrip())
            self._held, self._place = after, "between"
            return
        begun = next(n for n in range(len(CLOSING), -1, -1) if before.endswith(CLOSING[:n]))
        certain = before[: len(before) - begun].rstrip()
        self._held = before[len(certain) :]
        yield from self._reasoning_piece(certain)

    def _reasoning_piece(self, text: str) -> Iterator[Piece]:
        if not self._reasoned:
            text = text.lstrip()
        if text:
            self._reasoned = True
            yield Piece(text, is_reasoning=True)


class SplitReply(NamedTuple):
    """A reply in two parts, each "" if there is none."""

    reasoning: str
    answer: str


def split_reasoning(text: str, opened: bool = False) -> SplitReply:
    """Separate the reasoning of a complete reply from its answer; `opened` as in `ReasoningSplitter`."""
    splitter = ReasoningSplitter(opened)
    pieces = [*splitter.push(text), *splitter.flush()]
    reasoning, answer = ("".join(p.text for p in pieces if p.is_reasoning == which) for which in (True, False))
    return SplitReply(reasoning, answer)
