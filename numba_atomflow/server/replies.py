"""Replies in the shapes of OpenAI's API: as one JSON object, or as the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from numba_atomflow.server.stream import Ended, Piece

_REASONS = {"eos": "stop", "stop": "stop", "max_tokens": "length", "context": "length", "interrupted": "length"}

DONE = b"data: [DONE]\n\n"


def server_sent_event(record: dict[str, Any]) -> bytes:
    """A record as an event of a stream (SSE)."""
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Shape(Protocol):
    """Makes events into what the client gets. A request of several prompts has several generations, one by one."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""

    def chunks(self, event: Piece | Ended) -> list[dict[str, Any]]:
        """Chunks of a stream."""

    def add(self, event: Piece | Ended) -> None:
        """Take an event into the reply that `whole` returns."""

    def whole(self) -> dict[str, Any]:
        """The reply as one object, and the last chunk of a stream with its usage."""

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk without choices that ends a stream where the client asked for the usage."""


@dataclass
class _Base:
    """What both shapes share.

    Args:
        model: its name. include_usage: a stream has a field `usage`.
    """

    model: str
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    _ended: list[Ended] = field(default_factory=list)
    _prefix = ""

    def __post_init__(self) -> None:
        self._id = f"{self._prefix}-{secrets.token_hex(12)}"

    def usage(self) -> dict[str, Any]:
        """Tokens of all generations so far."""
        prompt = sum(ended.prompt_tokens for ended in self._ended)
        tokens = sum(ended.tokens for ended in self._ended)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(ended.cached_tokens for ended in self._ended)},
        }

    def _record(self, kind: str, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": list(choices),
        }

    def _chunk(self, kind: str, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return self._record(kind, choices) | ({"usage": None} if self.include_usage else {})


@dataclass
class ChatShape(_Base):
    """Of /v1/chat/completions."""

    _prefix = "chatcmpl"
    _text: list[str] = field(default_factory=list)

    def opening(self) -> list[dict[str, Any]]:
        return [self._delta({"role": "assistant", "content": ""})]

    def chunks(self, event: Piece | Ended) -> list[dict[str, Any]]:
        if isinstance(event, Piece):
            return [self._delta({"content": event.text})] if event.text else []
        self._ended.append(event)
        return [self._delta({}, _REASONS[event.finish_reason])]

    def add(self, event: Piece | Ended) -> None:
        if isinstance(event, Piece):
            self._text.append(event.text)
        else:
            self._ended.append(event)

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self._text), "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": _REASONS[self._ended[0].finish_reason],
        }
        return self._record("chat.completion", [choice]) | {"usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        return self._record("chat.completion.chunk", []) | {"usage": self.usage()}

    def _delta(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._chunk("chat.completion.chunk", [choice])


@dataclass
class CompletionShape(_Base):
    """Of /v1/completions.

    Args:
        echoed: the text to put before each reply; "" without `echo`.
    """

    echoed: list[str] = field(default_factory=list)
    _prefix = "cmpl"
    _texts: list[list[str]] = field(default_factory=list)

    def opening(self) -> list[dict[str, Any]]:
        return [self._part(index, text) for index, text in enumerate(self.echoed) if text]

    def chunks(self, event: Piece | Ended) -> list[dict[str, Any]]:
        if isinstance(event, Piece):
            return [self._part(event.choice, event.text)] if event.text else []
        self._ended.append(event)
        return [self._part(event.choice, "", _REASONS[event.finish_reason])]

    def add(self, event: Piece | Ended) -> None:
        if isinstance(event, Ended):
            self._ended.append(event)
            return
        while len(self._texts) <= event.choice:
            self._texts.append([self.echoed[len(self._texts)]])
        self._texts[event.choice].append(event.text)

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(ended.choice, "".join(text), _REASONS[ended.finish_reason])
            for ended, text in zip(self._ended, self._texts, strict=True)
        ]
        return self._record("text_completion", choices) | {"usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        return self._record("text_completion", []) | {"usage": self.usage()}

    def _part(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        return self._chunk("text_completion", [self._choice(index, text, reason)])

    def _choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
