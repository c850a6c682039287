"""Speculative generations on a device: a step that verifies runs while the caller takes the tokens of the one before.

The device chooses the tokens, so that the host has them all when a step has ended. It then proposes, and launches the
next step, before it yields the first of them (overlap scheduling): detokenizing, streaming and whatever else the caller
does take no time of the device, as long as they take less than a step. A step whose result is not waited for, because
the caller has left, changes nothing: it writes keys and values beyond the context, which are overwritten before they
are read.
"""

import time
from collections.abc import Callable, Iterator, Sequence

from numba_atomflow.context import Context
from numba_atomflow.generation import (
    GenerationState,
    Request,
    prompt_logits,
    record_token,
    room_for,
    sample_after_prompt,
    takes_the_most_likely,
    tokens_are_enough,
)
from numba_atomflow.sampling import Sampler
from numba_atomflow.speculation.speculator import Speculator

_WAITED = 0.25  # a step's time is known if the host has waited for it during at least this part


def device_chooses(context: Context, request: Request) -> bool:
    """Whether `overlapped_loop` can generate: the device chooses the tokens, and nothing else of a step is needed."""
    if context.backend.launch_verification is None or request.drafter is None or not tokens_are_enough(request):
        return False
    return takes_the_most_likely(request) or request.params.prompt_logprobs is None


def overlapped_loop(state: GenerationState, context: Context, request: Request, reused: int) -> Iterator[int]:
    """Generate with proposed tokens, as `host_sampled_loop` does, where `device_chooses`. The tokens are those of
    `token_loop`.

    Args:
        context: holds the first `reused` tokens of the prompt, which are not computed again.
    """
    stats = state.stats
    stats.prompt_tokens, stats.reused_tokens = len(request.prompt), reused
    sampler = Sampler(request.params, context.vocabulary, request.prompt)
    steps = _Steps(context, request, sampler)
    tokens = _first_token(state, context, request, sampler, reused)
    stats.ttft = time.perf_counter() - request.started
    yield from _take(state, context, request, tokens, 0)
    if state.finish_reason is None:
        steps.launch(state, tokens)
    while state.finish_reason is None:
        last, tokens = tokens[-1], steps.wait(state)
        context.token_ids.append(last)  # the step has put it into the KV cache
        try:
            if not _is_last(state, context, request, tokens):
                steps.launch(state, tokens)
        except Exception:  # of the drafter, for example: the tokens are right
            yield from _take(state, context, request, tokens, len(tokens) - 1)
            raise
        yield from _take(state, context, request, tokens, len(tokens) - 1)


class _Steps:
    """The steps of a generation, one at a time."""

    def __init__(self, context: Context, request: Request, sampler: Sampler) -> None:
        width = context.backend.verification.width
        self._context, self._request, self._sampler = context, request, sampler
        self._sampled = not takes_the_most_likely(request)
        self._speculator = Speculator(request.drafter, width, context.vocabulary, request.eos_ids)
        self._text = list(request.prompt)
        self._proposed: list[int] = []
        self._wait: Callable[[], list[int]]
        self._started = 0.0
        self._seconds: float | None = None  # of the last step, if they are known

    def launch(self, state: GenerationState, tokens: Sequence[int]) -> None:
        """Propose and launch the step after these tokens, all but the last of which are in the KV cache. Those that the
        caller has not taken yet are counted neither in `state` nor in the context.
        """
        if state.stats.steps:
            self._speculator.observe(len(self._proposed), len(tokens) - 1, self._seconds)
        asked, context = time.perf_counter(), self._context
        self._text += tokens
        ahead = len(self._text) - 1 - len(context.token_ids)
        generated = len(self._text) - len(self._request.prompt)
        self._proposed = self._speculator.propose(self._text, room_for(context, self._request, generated, ahead))
        self._started = time.perf_counter()
        state.stats.drafting_seconds += self._started - asked
        self._wait = context.launch_verification([tokens[-1], *self._proposed], ahead, sampled=self._sampled)

    def wait(self, state: GenerationState) -> list[int]:
        """Wait for the tokens that the step has chosen; those before the last had been proposed."""
        asked = time.perf_counter()
        tokens = self._wait()
        ended = time.perf_counter()
        # When a step ended is not known if the caller still had the tokens of the one before.
        known = ended - asked > _WAITED * (ended - self._started)
        self._seconds = ended - self._started if known else None
        for token in tokens:
            self._sampler.note(token)
        state.stats.steps += 1
        state.stats.proposed += len(self._proposed)
        return tokens


def _first_token(
    state: GenerationState, context: Context, request: Request, sampler: Sampler, reused: int
) -> list[int]:
    """Feed the prompt from token `reused` on; the first token of the reply."""
    if takes_the_most_likely(request):
        return [sampler.choose(prompt_logits(state, context, request, reused)[0])]
    tokens = sample_after_prompt(context, request, sampler, reused)
    sampler.note(tokens[0])
    return list(tokens)


def _take(
    state: GenerationState, context: Context, request: Request, tokens: Sequence[int], accepted: int
) -> Iterator[int]:
    """Tokens of a step, each recorded when the caller takes it; the first `accepted` had been proposed."""
    stats = state.stats
    for number, token in enumerate(tokens):
        stats.decode_seconds = time.perf_counter() - request.started - stats.ttft
        stats.accepted += number < accepted
        record_token(state, context, request, token)
        yield token
        if state.finish_reason:
            return
        if number < len(tokens) - 1:
            context.token_ids.append(token)


def _is_last(state: GenerationState, context: Context, request: Request, tokens: Sequence[int]) -> bool:
    """Whether the generation ends with these tokens, which are not recorded yet."""
    room = room_for(context, request, state.stats.tokens + len(tokens), len(tokens) - 1)
    return room < 1 or any(token in request.eos_ids for token in tokens)
