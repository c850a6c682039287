"""Replies in the shapes of OpenAI's API: as one JSON object, or as the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.server.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, joined
from numba_atomflow.server.stream import Ended, Piece, Progress, PromptScored
from numba_atomflow.text.reasoning import Piece as ReplyPiece
from numba_atomflow.text.reasoning import ReasoningSplitter
from numba_atomflow.text.tool_calls import CallDelta, ToolCallParser

_REASONS = {"eos": "stop", "stop": "stop", "max_tokens": "length", "context": "length", "interrupted": "length"}

DONE = b"data: [DONE]\n\n"


def server_sent_event(record: dict[str, Any]) -> bytes:
    """A record as an event of a stream (SSE)."""
    return b"data: " + json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Shape(Protocol):
    """Makes events into what the client gets. A request of several prompts has several generations, one by one."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""

    def chunks(self, event: Progress) -> list[dict[str, Any]]:
        """Chunks of a stream."""

    def add(self, event: Progress) -> None:
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
    """Of /v1/chat/completions.

    Args:
        names: of tokens, where the log-probabilities of the reply are wanted.
        calls: separates tool calls from the text, where the reply may have some.
        reasoning: separates what the model writes before its answer, where it may.
    """

    names: TokenNames | None = None
    calls: ToolCallParser | None = None
    reasoning: ReasoningSplitter | None = None
    _prefix = "chatcmpl"
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[dict[str, Any]] = field(default_factory=list)
    _logprobs: list[TokenLogprobs] = field(default_factory=list)

    def opening(self) -> list[dict[str, Any]]:
        return [self._delta({"role": "assistant", "content": ""})]

    def chunks(self, event: Progress) -> list[dict[str, Any]]:
        deltas = self._take(event)
        if isinstance(event, Ended):
            return [*map(self._delta, deltas), self._delta({}, reason=self._reason())]
        logprobs = _shown(event) if isinstance(event, Piece) else []
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        return [self._delta(delta, () if index else logprobs) for index, delta in enumerate(deltas)]

    def add(self, event: Progress) -> None:
        self._take(event)
        if isinstance(event, Piece):
            self._logprobs += _shown(event)

    def _take(self, event: Progress) -> list[dict[str, Any]]:
        """Add an event's text and calls to the message; the same as deltas of a stream."""
        deltas: list[dict[str, Any]] = []
        for piece in self._pieces(event):
            if piece.is_reasoning:
                self._reasoning.append(piece.text)
                deltas.append({"reasoning_content": piece.text})
            else:
                deltas += self._answer_deltas(self.calls.push(piece.text) if self.calls else [piece.text])
        if isinstance(event, Ended):
            self._ended.append(event)
            deltas += self._answer_deltas(self.calls.flush() if self.calls else [])
        return deltas

    def _pieces(self, event: Progress) -> Iterable[ReplyPiece]:
        """An event's text, as far as it is certain whether it is reasoning."""
        if isinstance(event, Piece) and event.text:
            return self.reasoning.push(event.text) if self.reasoning else [ReplyPiece(event.text, is_reasoning=False)]
        return self.reasoning.flush() if self.reasoning and isinstance(event, Ended) else ()

    def _answer_deltas(self, parts: Iterable[str | CallDelta]) -> list[dict[str, Any]]:
        return [self._text_delta(part) if isinstance(part, str) else self._call_delta(part) for part in parts]

    def _text_delta(self, text: str) -> dict[str, Any]:
        self._text.append(text)
        return {"content": text}

    def _call_delta(self, part: CallDelta) -> dict[str, Any]:
        if part.name is None:
            self._calls[part.index]["function"]["arguments"] += part.arguments
            return {"tool_calls": [{"index": part.index, "function": {"arguments": part.arguments}}]}
        function = {"name": part.name, "arguments": ""}
        self._calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        return {"tool_calls": [{"index": part.index, **self._calls[-1], "function": dict(function)}]}

    def _reason(self) -> str:
        reason = _REASONS[self._ended[0].finish_reason]
        return "tool_calls" if self._calls and reason == "stop" else reason

    def whole(self) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs_record(self._logprobs),
            "finish_reason": self._reason(),
        }
        return self._record("chat.completion", [choice]) | {"usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        return self._record("chat.completion.chunk", []) | {"usage": self.usage()}

    def _delta(
        self, delta: dict[str, Any], logprobs: Sequence[TokenLogprobs] = (), reason: str | None = None
    ) -> dict[str, Any]:
        record = self._logprobs_record(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": record, "finish_reason": reason}
        return self._chunk("chat.completion.chunk", [choice])

    def _logprobs_record(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return None if self.names is None else chat_logprobs(self.names, logprobs)


def _shown(event: Piece) -> list[TokenLogprobs]:
    """Log-probabilities of the tokens of a chat's text; EOS is not part of it."""
    return event.logprobs[:-1] if event.is_eos else event.logprobs


class Prompt(NamedTuple):
    """A prompt of /v1/completions.

    Attributes:
        echoed: the text to put before the reply; "" without `echo`.
        logprobs: those of the choice, where they are wanted.
    """

    token_ids: list[int]
    echoed: str
    logprobs: CompletionLogprobs | None


@dataclass
class CompletionShape(_Base):
    """Of /v1/completions."""

    prompts: Sequence[Prompt] = ()
    _prefix = "cmpl"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._texts = [[prompt.echoed] for prompt in self.prompts]
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in self.prompts]

    def opening(self) -> list[dict[str, Any]]:
        return [self._part(number, prompt.echoed) for number, prompt in enumerate(self.prompts) if prompt.echoed]

    def chunks(self, event: Progress) -> list[dict[str, Any]]:
        if isinstance(event, Ended):
            self._ended.append(event)
            return [self._part(event.choice, "", reason=_REASONS[event.finish_reason])]
        logprobs, text = self._logprobs_record(event), event.text if isinstance(event, Piece) else ""
        return [self._part(event.choice, text, logprobs)] if text or logprobs else []

    def add(self, event: Progress) -> None:
        if isinstance(event, Ended):
            self._ended.append(event)
            return
        if isinstance(event, Piece):
            self._texts[event.choice].append(event.text)
        if (logprobs := self._logprobs_record(event)) is not None:
            self._logprobs[event.choice].append(logprobs)

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(
                ended.choice,
                "".join(text),
                joined(logprobs) if logprobs else None,
                _REASONS[ended.finish_reason],
            )
            for ended, text, logprobs in zip(self._ended, self._texts, self._logprobs, strict=True)
        ]
        return self._record("text_completion", choices) | {"usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        return self._record("text_completion", []) | {"usage": self.usage()}

    def _part(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return self._chunk("text_completion", [self._choice(index, text, logprobs, reason)])

    def _choice(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_record(self, event: PromptScored | Piece) -> dict[str, Any] | None:
        prompt = self.prompts[event.choice]
        if prompt.logprobs is None or not event.logprobs:
            return None
        if isinstance(event, PromptScored):
            return prompt.logprobs.prompt(prompt.token_ids, event.logprobs)
        return prompt.logprobs.reply(event.logprobs)
