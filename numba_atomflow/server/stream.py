"""The engine's one stream: requests wait in order, and one thread generates.

The event loop takes a `Ticket` when a request arrives, which is its place in the queue, and fills it when the prompt is
tokenized. The thread serves tickets in that order, skips those that are not filled yet, and puts events into them. A
slow client never stops the thread: its events wait in its ticket, at most those of one reply.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from numba_atomflow.engine import Engine, FinishReason, Generation
from numba_atomflow.errors import AtomFlowError, CheckpointError
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.server.errors import ApiError, of_engine
from numba_atomflow.server.prefixes import Prefixes

PREFILL_TOKENS = 512  # of a long prompt at a time: between them the thread notices that a client has left

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """One generation.

    Attributes:
        is_chat: the reply begins a text; otherwise it continues the prompt.
        only_prompt: nothing but the prompt's log-probabilities is wanted.
    """

    prompt: list[int]
    params: SamplingParams
    is_chat: bool
    only_prompt: bool = False


class Piece(NamedTuple):
    """A token, and the text that is complete with it."""

    choice: int  # number of the generation among those of the request
    text: str
    logprobs: list[TokenLogprobs]  # empty unless requested
    is_eos: bool


class PromptScored(NamedTuple):
    """Log-probabilities of a prompt, before the first piece."""

    choice: int
    logprobs: list[TokenLogprobs | None]


class Ended(NamedTuple):
    """The end of one generation."""

    choice: int
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int  # of the prompt, not computed again
    tokens: int


class Failed(NamedTuple):
    """The end of the request by an error."""

    error: ApiError


Progress = PromptScored | Piece | Ended  # of a generation
Event = Progress | Failed


class Observer(Protocol):
    """What the thread tells about its work (see `metrics`)."""

    def started(self, waited: float) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def generated(self, ended: Ended, decode_seconds: float) -> None: ...

    def cancelled(self) -> None: ...


class Ticket:
    """A request's place in the queue, and the events of its reply.

    Args:
        loop: of the consumer. deadline: when the request ends in any case, by `time.monotonic`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self._loop, self.deadline = loop, deadline
        self.arrived = time.monotonic()
        self.work: Sequence[Work] | None = None
        self.cancelled = False
        self._events: deque[Event] = deque()
        self._ended = False
        self._waiting = asyncio.Event()
        self._wake_up_sent = False
        self.timer: asyncio.TimerHandle | None = None

    def put(self, *events: Event, last: bool = False) -> None:
        """Add events; the consumer is woken once for all that it has not seen. Called by the thread."""
        self._events.extend(events)
        self._ended = self._ended or last
        if not self._wake_up_sent:
            self._wake_up_sent = True
            with suppress(RuntimeError):  # the loop is closed: the consumer is gone
                self._loop.call_soon_threadsafe(self._waiting.set)

    async def batches(self) -> AsyncIterator[list[Event]]:
        """All events, those that have come since the last time together; the last batch may be empty."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            self._wake_up_sent = False  # before the events are taken: a later one wakes again
            ended = self._ended
            batch = []
            while self._events:
                batch.append(self._events.popleft())
            yield batch
            if ended and not self._events:
                return

    def is_over(self) -> bool:
        """Whether no one waits for the reply any more."""
        return self.cancelled or time.monotonic() >= self.deadline


@dataclass
class Stream:
    """The queue and the thread.

    Args:
        engine: that no other thread uses. prefixes: of its KV cache.
        most_waiting: tickets that may wait; the one that is served does not count.
        seconds_per_request: from its arrival to its end.
    """

    engine: Engine
    prefixes: Prefixes
    observer: Observer
    most_waiting: int
    seconds_per_request: float
    failure: str | None = None  # why the engine can no longer run
    _tickets: deque[Ticket] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _serving: Ticket | None = None
    _closing: bool = False
    _mean_seconds: float = 1.0  # of a request, for Retry-After

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._tickets)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being served."""
        return self._serving is not None

    def take_ticket(self) -> Ticket:
        """The last place in the queue.

        Raises:
            ApiError: the queue is full, or the server ends.
        """
        ticket = Ticket(asyncio.get_running_loop(), time.monotonic() + self.seconds_per_request)
        with self._changed:
            if self._closing:
                raise _shutting_down()
            if len(self._tickets) >= self.most_waiting:
                seconds = min(max(round(self._mean_seconds * len(self._tickets)), 1), 60)
                raise ApiError(
                    429,
                    f"The queue is full: {len(self._tickets)} requests wait for the one stream; try again later.",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._tickets.append(ticket)
        ticket.timer = asyncio.get_running_loop().call_later(self.seconds_per_request, self._expire, ticket)
        return ticket

    def submit(self, ticket: Ticket, work: Sequence[Work]) -> None:
        """Let the ticket be served when its turn comes."""
        with self._changed:
            ticket.work = work
            self._changed.notify_all()

    def release(self, ticket: Ticket) -> None:
        """Give up the ticket's place, or end its generation with the token that is being generated, if there is one."""
        if ticket.timer is not None:
            ticket.timer.cancel()
        with self._changed:
            ticket.cancelled = True
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                if ticket.work is not None:  # it was a request that could be served
                    self.observer.cancelled()
            self._changed.notify_all()

    def _expire(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket not in self._tickets:  # it is being served; the thread watches its deadline
                return
            self._tickets.remove(ticket)
        ticket.put(Failed(self._too_late()), last=True)

    def _too_late(self) -> ApiError:
        return ApiError(
            503,
            f"No token was generated within {self.seconds_per_request:g} seconds, the limit of a request.",
            code="request_timeout",
        )

    def close(self) -> None:
        """End what is running, refuse what waits, and let the thread end; it is not waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        if self._thread.is_alive():
            self._thread.join()

    # --- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (ticket := self._next()) is not None:
            try:
                self._serve(ticket)
            finally:
                with self._changed:
                    self._serving = None
        with self._changed:
            left, self._tickets = list(self._tickets), deque()
        for ticket in left:
            ticket.put(Failed(_shutting_down()), last=True)

    def _next(self) -> Ticket | None:
        """The first ticket that is filled, once there is one; None at the end."""
        with self._changed:
            while not self._closing:
                for ticket in self._tickets:
                    if ticket.work is not None:
                        self._tickets.remove(ticket)
                        self._serving = ticket
                        return ticket
                self._changed.wait()
        return None

    def _serve(self, ticket: Ticket) -> None:
        assert ticket.work is not None  # noqa: S101 - for mypy; `_next` has checked it
        started = time.monotonic()
        self.observer.started(started - ticket.arrived)
        try:
            for choice, work in enumerate(ticket.work):
                self._generate(ticket, choice, work)
            ticket.put(last=True)
        except _LeftError:
            self.observer.cancelled()
            ticket.put(last=True)
        except ApiError as error:
            ticket.put(Failed(error), last=True)
        except AtomFlowError as error:
            if isinstance(error, CheckpointError):
                self.failure = str(error)
            ticket.put(Failed(of_engine(error)), last=True)
        except Exception:
            _log.exception("a request failed by a bug in numba-atomflow")
            ticket.put(Failed(ApiError(500, "The request failed by a bug of this server; see its log.")), last=True)
        self._mean_seconds += 0.2 * (time.monotonic() - started - self._mean_seconds)

    def _generate(self, ticket: Ticket, choice: int, work: Work) -> None:
        scored = work.params.prompt_logprobs is not None
        cached = 0 if scored else self._prefill(ticket, work.prompt)
        start: Callable[..., Generation] = self.engine.chat_tokens if work.is_chat else self.engine.generate
        generation = start(work.prompt, work.params).before_each_chunk(lambda: self._check(ticket, 0))
        begun = first = time.monotonic()
        tokens = 0
        with suppress(StopIteration):
            while True:
                text = generation.step()
                if not tokens:
                    first = time.monotonic()
                    self.observer.first_token(first - (ticket.arrived if choice == 0 else begun))
                    if scored:
                        ticket.put(PromptScored(choice, generation.prompt_logprobs))
                    if work.only_prompt:
                        break
                logprobs = generation.logprobs[tokens:]
                tokens = len(generation.token_ids)
                ticket.put(Piece(choice, text, logprobs, generation.finish_reason == "eos"))
                if ticket.is_over() or self._closing:
                    generation.close()
                    break
        ended = Ended(choice, generation.finish_reason or "max_tokens", len(work.prompt), cached, tokens)
        self.observer.generated(ended, time.monotonic() - first)
        self._check(ticket, tokens)
        ticket.put(ended)

    def _prefill(self, ticket: Ticket, prompt: list[int]) -> int:
        """Put a long prompt into the KV cache, but its end; the number of tokens that were known already."""
        cached = self.prefixes.prepare(prompt)
        position = cached
        while True:
            self._check(ticket, 0)
            if len(prompt) - position <= PREFILL_TOKENS or len(prompt) > self.engine.max_seq_len:
                return cached
            if position == cached:
                self.engine.rewind(position)
            self.engine.feed(prompt[position : position + PREFILL_TOKENS])
            position += PREFILL_TOKENS

    def _check(self, ticket: Ticket, tokens: int) -> None:
        """End the request if it has become pointless; one that has lasted too long keeps the tokens that it has.

        Raises:
            ApiError: it has lasted too long without a token, or the server ends.
            _LeftError: the client is gone.
        """
        if ticket.cancelled:
            raise _LeftError
        if self._closing:
            raise _shutting_down()
        if not tokens and ticket.is_over():
            raise self._too_late()


class _LeftError(Exception):
    """The client is gone."""


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down")
