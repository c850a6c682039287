"""Generations in progress: iterators over the text or the token ids that an engine generates."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.constraints.base import ConstraintState
from numba_atomflow.context import Context
from numba_atomflow.logprobs import TokenLogprobs, token_logprobs
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.speculation.drafter import Drafter
from numba_atomflow.speculation.speculator import Speculator
from numba_atomflow.text.detokenizer import Detokenizer
from numba_atomflow.text.stop_strings import StopStrings
from numba_atomflow.utils.exclusive_calls import ExclusiveCalls, busy_elsewhere, runs_elsewhere

FinishReason = Literal["eos", "stop", "max_tokens", "context", "interrupted"]
Item = TypeVar("Item", int, str)


@dataclass
class GenerationStats:
    """Token counts and times of a generation. Times are in seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the KV cache (prefix hit)
    tokens: int = 0  # generated, including EOS
    ttft: float = 0.0  # from the call to the first token
    decode_seconds: float = 0.0  # from the first token to the last, including host and caller
    constraint_seconds: float = 0.0  # of all times, spent in the constraint
    steps: int = 0  # decode steps, after that of the first token
    proposed: int = 0  # tokens that the drafter proposed, and a step checked
    accepted: int = 0  # of them, those that are part of the reply
    drafting_seconds: float = 0.0  # of `decode_seconds`, spent on proposals

    @property
    def tokens_per_second(self) -> float:
        """Decode speed: tokens after the first, per second; 0 if there were none."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first, in seconds; 0 if there were none."""
        return self.decode_seconds / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def steps_per_second(self) -> float:
        """Decode steps per second, each of which reads every weight once; 0 if there were none."""
        return self.steps / self.decode_seconds if self.steps else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Mean number of tokens that a decode step generated: 1 without speculation; 0 if there was no step."""
        return (self.tokens - 1) / self.steps if self.steps else 0.0


@dataclass
class GenerationState:
    """The state of a generation, written by its iterator. The iterator does not refer to the generation itself, so an
    abandoned generation is freed at once.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: GenerationStats = field(default_factory=GenerationStats)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    before_chunk: Callable[[], None] = lambda: None  # called before each chunk of a prompt that is scored


class BaseGeneration(Generic[Item]):
    """Base class of generations of text and of token ids.

    Args:
        make_items: creates the iterator that generates, and updates the state.
        calls: serializes calls of the engine; each item is one call.
    """

    def __init__(self, make_items: Callable[[GenerationState], Iterator[Item]], calls: ExclusiveCalls) -> None:
        self._state = GenerationState()
        self._items: Iterator[Item] = make_items(self._state)
        self._calls = calls
        self._thread = threading.current_thread()  # of the last call

    @property
    def token_ids(self) -> list[int]:
        """All generated tokens so far."""
        return self._state.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the generation ended; None while it is in progress."""
        return self._state.finish_reason

    @property
    def stats(self) -> GenerationStats:
        """Counts and times so far."""
        return self._state.stats

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of each token in `token_ids`, if `SamplingParams.logprobs` requests it; otherwise empty."""
        return self._state.logprobs

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None]:
        """Of each token of the prompt, None for the first, if `SamplingParams.prompt_logprobs` requests it.

        It is complete when the first item has been generated.
        """
        return self._state.prompt_logprobs

    def before_each_chunk(self, check: Callable[[], None]) -> Self:
        """Call `check` before each chunk of a prompt with `prompt_logprobs`, all of which comes before the first item.

        What it raises ends the generation, so that a program can give up a long prompt.
        """
        self._state.before_chunk = check
        return self

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        """The next item.

        Raises:
            EngineBusyError: another call of the engine is running.
            CheckpointError: the model file was changed by another program, or is damaged.
        """
        return self._calls.run(self._next)

    def _next(self) -> Item:
        self._thread = threading.current_thread()
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException:  # for example Ctrl-C
            self.close()
            raise

    def close(self) -> None:
        """Stop. The generated tokens stay in the KV cache, so that a chat can continue."""
        if self._state.finish_reason is None:
            self._state.finish_reason = "interrupted"
        self._items = iter(())

    def interrupt(self) -> None:
        """End the generation before the KV cache changes.

        Raises:
            EngineBusyError: another thread is generating.
        """
        if self._state.finish_reason is None and runs_elsewhere(self._thread):
            raise busy_elsewhere()
        self.close()

    def finish(self) -> Self:
        """Generate to the end."""
        for _ in self:
            pass
        return self


class TokenGeneration(BaseGeneration[int]):
    """A generation in progress: an iterator over its token ids, including EOS.

    Attributes:
        token_ids, finish_reason, stats, logprobs, prompt_logprobs: as those of `Generation`; there is no "stop".
    """


class Generation(BaseGeneration[str]):
    """A generation in progress: an iterator over pieces of its text.

    Attributes:
        text: all text so far.
        token_ids: all generated tokens so far.
        finish_reason: None while in progress, then "eos", "stop" (a stop string), "max_tokens", "context" (full) or
            "interrupted" (closed early).
        stats: counts and times.
        logprobs, prompt_logprobs: of tokens, where the `SamplingParams` request them.
    """

    text = ""

    def step(self) -> str:
        """Generate one token; the text that is complete with it, "" if there is none yet. Iterating skips the latter.

        Raises:
            StopIteration: the generation has ended.
            EngineBusyError, CheckpointError: as when iterating.
        """
        piece = super().__next__()
        self.text += piece
        return piece

    def __next__(self) -> str:
        while not (piece := self.step()):
            pass
        return piece


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt: its tokens. eos_ids: tokens that end the generation.
        started: when the caller asked, by `time.perf_counter`.
        constraint: the reply's, at its beginning, if `params` has one.
        drafter: what proposes tokens, if anything does.
    """

    prompt: list[int]
    params: SamplingParams
    eos_ids: Collection[int]
    started: float
    constraint: ConstraintState | None = None
    drafter: Drafter | None = None


def token_loop(state: GenerationState, context: Context, request: Request, reused: int) -> Iterator[int]:
    """Generate token by token. The backend runs ahead of the host, which waits for it in `sampled_tokens` only.

    Args:
        context: holds the first `reused` tokens of the prompt, which are not computed again.
    """
    stats, backend = state.stats, context.backend
    stats.prompt_tokens, stats.reused_tokens = len(request.prompt), reused
    backend.start(Sampler(request.params, context.vocabulary, request.prompt))
    context.prefill(request.prompt[reused:], SAMPLE)
    tokens = backend.sampled_tokens()
    stats.ttft = time.perf_counter() - request.started
    while True:
        logprobs = () if request.params.logprobs is None else backend.sampled_logprobs()
        for number, token in enumerate(tokens, 1):
            state.logprobs.extend(logprobs[number - 1 : number])
            record_token(state, context, request, token)
            yield token
            if state.finish_reason:
                return
            if number < len(tokens):  # the step that sampled it has also put it into the KV cache
                context.token_ids.append(token)
        stats.steps += 1
        context.decode(tokens[-1])
        tokens = backend.sampled_tokens()
        stats.decode_seconds = time.perf_counter() - request.started - stats.ttft


def needs_logits(request: Request) -> bool:
    """Whether the host has to see the logits of each token: then `host_sampled_loop` generates, not `token_loop`."""
    params = request.params
    options = params.prompt_logprobs, params.constraint, request.drafter
    return any(option is not None for option in options)


def host_sampled_loop(state: GenerationState, context: Context, request: Request, reused: int) -> Iterator[int]:
    """Generate token by token as `token_loop` does, but choose each on the host, from its logits.

    It runs on every backend. On the CPU the tokens are those of `token_loop`, because the logits have the same bits; on
    a GPU the logits of each token are copied to the host, and no step is launched ahead.

    With a drafter, a step also has the logits after each of the proposed tokens. As long as the token that is chosen is
    the one that was proposed, the next one is chosen from the same step's logits: every token is chosen as without a
    drafter, from logits of the same bits, with the same draw. Where a device can choose the tokens, and nothing else is
    asked for, `overlapped_loop` generates.

    Args:
        context: holds the first `reused` tokens of the prompt, which are not computed again.
    """
    stats = state.stats
    stats.prompt_tokens, stats.reused_tokens = len(request.prompt), reused
    sampler = Sampler(request.params, context.vocabulary, request.prompt, request.constraint)
    speculator = Speculator(request.drafter, context.backend.verification.width, context.vocabulary, request.eos_ids)
    only_tokens = takes_the_most_likely(request)
    rows: Iterable[NDArray[np.float32] | int] = prompt_logits(state, context, request, reused)
    step: Callable[[Sequence[int]], Iterable[NDArray[np.float32] | int]]
    step = context.verify_greedy if only_tokens else context.verify
    text, proposed, step_seconds = list(request.prompt), list[int](), 0.0
    while True:
        accepted = 0
        for row in rows:
            token = _choose(state, context, request, sampler, row)
            text.append(token)
            is_accepted = accepted < len(proposed) and token == proposed[accepted]
            accepted += is_accepted
            stats.accepted += is_accepted
            yield token
            if state.finish_reason:
                return
            if not is_accepted:
                break
            context.token_ids.append(token)  # the step has put it into the KV cache
        if stats.steps:
            speculator.observe(len(proposed), accepted, step_seconds)
        asked = time.perf_counter()
        proposed = speculator.propose(text, room_for(context, request, stats.tokens))
        started = time.perf_counter()
        rows = step([token, *proposed])
        step_seconds = time.perf_counter() - started
        stats.drafting_seconds += started - asked
        stats.steps += 1
        stats.proposed += len(proposed)


def tokens_are_enough(request: Request) -> bool:
    """Whether the host needs to see no logits of the reply."""
    return request.params.logprobs is None and request.params.constraint is None


def takes_the_most_likely(request: Request) -> bool:
    """Whether each token is the most likely one, and nothing but its number is of interest."""
    params = request.params
    return params.greedy and params.repetition_penalty == 1.0 and tokens_are_enough(request)


def sample_after_prompt(context: Context, request: Request, sampler: Sampler, reused: int) -> Sequence[int]:
    """Feed the prompt from token `reused` on, as `token_loop` does; the first token of the reply."""
    context.backend.start(sampler)
    context.prefill(request.prompt[reused:], SAMPLE)
    return context.backend.sampled_tokens()


def prompt_logits(state: GenerationState, context: Context, request: Request, reused: int) -> NDArray[np.float32]:
    """Feed the prompt from token `reused` on; the logits [1, V] of its last token."""
    top, rest = request.params.prompt_logprobs, request.prompt[reused:]
    if top is not None:
        return _feed_prompt_with_logprobs(state, context, request.prompt, top)[None]
    # A single token as `token_loop` feeds it, in a decode step, whose bits differ on a GPU from a prompt's.
    return context.verify(rest) if len(rest) == 1 else context.feed(rest)[None]


def _choose(
    state: GenerationState, context: Context, request: Request, sampler: Sampler, row: NDArray[np.float32] | int
) -> int:
    """The next token by logits [V], or as the backend has chosen it, recorded with what is said of it and the time."""
    stats, top = state.stats, request.params.logprobs
    if isinstance(row, int):
        token = row
        sampler.note(token)
    else:
        token = sampler.choose(row)
    if top is not None and not isinstance(row, int):
        state.logprobs.append(token_logprobs(row, token, top))
    elapsed = time.perf_counter() - request.started
    if stats.tokens == 0:
        stats.ttft = elapsed
    stats.decode_seconds = elapsed - stats.ttft
    stats.constraint_seconds = sampler.constraint_seconds
    record_token(state, context, request, token)
    return token


def room_for(context: Context, request: Request, generated: int, ahead: int = 0) -> int:
    """The most tokens that the next step may generate: positions of the KV cache, and what `max_tokens` leaves.

    Args:
        generated: tokens before the step. ahead: tokens in the KV cache that the context does not have yet.
    """
    positions = context.max_seq_len - len(context.token_ids) - ahead
    return positions if request.params.max_tokens is None else min(positions, request.params.max_tokens - generated)


def _feed_prompt_with_logprobs(
    state: GenerationState, context: Context, prompt: list[int], top: int
) -> NDArray[np.float32]:
    """Feed all of a prompt and record the log-probabilities of its tokens; the logits [V] of the last."""
    state.prompt_logprobs.append(None)
    state.before_chunk()
    for logits in context.feed_by_chunks(prompt):
        for row in logits:
            if len(state.prompt_logprobs) < len(prompt):  # the last row predicts the first token of the reply
                token = prompt[len(state.prompt_logprobs)]
                state.prompt_logprobs.append(token_logprobs(row, token, top))
        state.before_chunk()
    return context.last_logits(len(prompt))


def record_token(state: GenerationState, context: Context, request: Request, token: int) -> None:
    """Count a generated token, and say whether it is the last one, and why."""
    state.token_ids.append(token)
    state.stats.tokens += 1
    if token in request.eos_ids:
        state.finish_reason = "eos"
    elif request.params.max_tokens is not None and state.stats.tokens >= request.params.max_tokens:
        state.finish_reason = "max_tokens"
    elif context.is_full:
        state.finish_reason = "context"


def text_pieces(
    state: GenerationState, tokens: Iterator[int], detokenizer: Detokenizer, params: SamplingParams
) -> Iterator[str]:
    """Text as its tokens come, "" for a token that completes none; what may become a stop string is held back."""
    stops = StopStrings(params.stop)
    for token in tokens:
        piece = "" if state.finish_reason == "eos" else stops.push(detokenizer.push(token))
        if params.stop and (hidden := detokenizer.special_text(token)):
            piece += stops.push(hidden, shown=False)
        if stops.found:
            state.finish_reason = "stop"
        yield piece
        if stops.found:
            return
    rest = stops.push(detokenizer.flush()) + stops.flush()
    if rest:
        yield rest
