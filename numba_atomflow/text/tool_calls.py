"""Tool calls in generated text: the model's own notation, to name and arguments, as the text arrives.

Two notations are known, by the chat template that teaches them to the model:

- hermes: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them after some text (Hermes,
  Qwen2.5, Qwen3);
- llama3: the whole reply is ``{"name": ..., "parameters": {...}}``, several of them with ``;`` between (Llama 3.1 to
  3.3). A special token ``<|python_tag|>`` before it is not part of the text.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from numba_atomflow.files.untrusted import load_json

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
# Characters before the arguments. With more, a call of Hermes is looked at when it has ended, not with each piece, and
# JSON of a reply that begins with "{" is no call.
_LONGEST_HEAD = 512


class ToolNotation(NamedTuple):
    """How a model writes a call: `begin`, an object with `name` and `arguments`, `end`."""

    name: str
    begin: str
    end: str
    arguments: str  # the name of the object's second field


HERMES = ToolNotation("hermes", "<tool_call>", "</tool_call>", "arguments")
LLAMA3 = ToolNotation("llama3", "", "", "parameters")


def tool_notation(chat_template: str | None) -> ToolNotation | None:
    """The notation that a chat template teaches; None: it has no tools, or another notation."""
    template = chat_template or ""
    if "tools" not in template:
        return None
    if HERMES.begin in template:
        return HERMES
    return LLAMA3 if '"parameters": ' in template and '"name": ' in template else None


@dataclass(frozen=True)
class CallDelta:
    """Part of a call: the first has its name and no arguments, those that follow have a piece of the arguments.

    Attributes:
        index: of the call in the reply, from 0.
        name: of the tool; None but in the first.
        arguments: JSON, to be joined.
    """

    index: int
    name: str | None
    arguments: str


class ToolCallParser:
    """Separates the calls of one reply from its text.

    Arguments are passed on as they arrive. What looks like a call but is malformed, or calls no tool of `names`, stays
    text. White space around calls is dropped.

    Args:
        notation: of the model.
        names: of the tools that may be called.
    """

    def __init__(self, notation: ToolNotation, names: Collection[str]) -> None:
        self._notation, self._names = notation, frozenset(names)
        self._pending = ""  # text that is not decided yet
        self._space = ""  # white space before what may be a call
        self._calls = 0
        self._is_text = False  # llama3: the reply has begun as text, and has no calls
        self._value = JsonObjectEnd()  # of the arguments
        self._events: list[str | CallDelta] = []
        self._state: Callable[[], bool] = self._text

    def push(self, text: str) -> list[str | CallDelta]:
        """What is certain after this piece of the reply: texts and parts of calls, in order."""
        self._pending += text
        while self._state():
            pass
        return self._taken()

    def flush(self) -> list[str | CallDelta]:
        """The rest, at the end of the reply."""
        if self._state == self._head:
            self._finish_call(self._pending, self._notation.begin + self._pending)
        elif self._state == self._text and not (self._calls and self._pending.isspace()):
            self._emit_text(self._pending)
        self._pending = ""
        return self._taken()

    def _taken(self) -> list[str | CallDelta]:
        events, self._events = self._events, []
        return events

    # --- states: each takes from the pending text, and returns whether another one has to look at the rest --------

    def _text(self) -> bool:
        begin, text = self._notation.begin, self._pending
        if not begin:
            return self._text_or_object()
        start = text.find(begin)
        if start >= 0:
            before = text[:start].rstrip()
            self._emit_text(before)
            self._space = text[len(before) : start]
            self._pending, self._state = text[start + len(begin) :], self._head
            return True
        certain = len(text) - _overlap(text, begin)
        certain = len(text[:certain].rstrip())
        self._emit_text(text[:certain])
        self._pending = text[certain:]
        return False

    def _text_or_object(self) -> bool:
        start = self._pending.lstrip()
        if not self._is_text and start.startswith("{"):
            self._space = self._pending[: -len(start)]
            self._pending, self._state = start, self._head
            return True
        if start or self._is_text:
            self._is_text = True
            self._emit_text(self._pending)
            self._pending = ""
        return False

    def _head(self) -> bool:
        """From the beginning of a call to its arguments."""
        head = _HEAD.match(self._pending, 0, _LONGEST_HEAD)
        name = _name(head[1]) if head else None
        if head and name in self._names:
            self._events.append(CallDelta(self._calls, name, ""))
            self._pending, self._state = self._pending[head.end() :], self._arguments
            self._value = JsonObjectEnd()
            return True
        end, after = self._call_end()
        if end < 0:
            return False
        whole = self._notation.begin + self._pending[:after]
        body, self._pending = self._pending[:end], self._pending[after:]
        self._finish_call(body, whole)
        self._state = self._text if self._notation.begin or self._is_text else self._separator
        return True

    def _call_end(self) -> tuple[int, int]:
        """Where the object of a call ends in the pending text, and where its notation ends; -1: not yet."""
        if self._notation.end:
            end = self._pending.find(self._notation.end)
            return end, end + len(self._notation.end)
        end = JsonObjectEnd().find(self._pending)
        if end < 0 and len(self._pending) > _LONGEST_HEAD:
            end = len(self._pending)
        return end, end

    def _arguments(self) -> bool:
        end = self._value.find(self._pending)
        piece = self._pending if end < 0 else self._pending[:end]
        self._pending = self._pending[len(piece) :]
        if piece:
            self._events.append(CallDelta(self._calls, None, piece))
        if end < 0:
            return False
        self._calls += 1
        self._value, self._state = JsonObjectEnd(depth=1), self._tail
        return True

    def _tail(self) -> bool:
        """From the arguments to the end of the call."""
        if self._notation.end:
            end = self._pending.find(self._notation.end)
            if end < 0:
                return False
            self._pending, self._state = self._pending[end + len(self._notation.end) :], self._text
            return True
        end = self._value.find(self._pending)
        self._pending = self._pending[end:] if end >= 0 else ""
        if end >= 0:
            self._state = self._separator
        return end >= 0

    def _separator(self) -> bool:
        """Llama 3: what is between two calls."""
        self._pending = self._pending.lstrip()
        if not self._pending:
            return False
        self._pending = self._pending.removeprefix(";")
        self._state = self._text
        return True

    # --- events ------------------------------------------------------------------------------------------------------

    def _finish_call(self, body: str, whole: str) -> None:
        """A call whose fields come in another order, or what is no call: then all of it is text."""
        call = _whole_call(body)
        if call is not None and call[0] in self._names:
            self._events += [CallDelta(self._calls, call[0], ""), CallDelta(self._calls, None, call[1])]
            self._calls += 1
        else:
            self._is_text = True
            self._emit_text(self._space + whole)

    def _emit_text(self, text: str) -> None:
        if text:
            self._events.append(text)


class JsonObjectEnd:
    """Finds the end of a JSON object that arrives in pieces.

    Args:
        depth: braces and brackets that are open at the beginning.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._escaped = depth, False, False

    def find(self, piece: str) -> int:
        """The index in this piece after the object's last brace; -1 if it goes on."""
        for index, character in enumerate(piece):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
        return -1


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _name(quoted: str) -> str | None:
    try:
        name = load_json(quoted)
    except ValueError:
        return None
    return name if isinstance(name, str) else None


def _whole_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a complete call; None: it is malformed."""
    try:
        call = load_json(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, dict):
        return call["name"], json.dumps(arguments, ensure_ascii=False)
    return (call["name"], arguments) if isinstance(arguments, str) else None
