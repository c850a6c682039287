"""Generations: of token ids, of text, and of replies in a conversation."""

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from numba_atomflow.constraints.base import ConstraintState
from numba_atomflow.engine.core import EngineCore, Message
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.generation import (
    BaseGeneration,
    Generation,
    GenerationState,
    Request,
    TokenGeneration,
    host_sampled_loop,
    needs_logits,
    text_pieces,
    token_loop,
)
from numba_atomflow.overlapped_generation import device_chooses, overlapped_loop
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.speculation.choose import choose_drafter
from numba_atomflow.speculation.drafter import Drafter
from numba_atomflow.text.detokenizer import Detokenizer

NewGeneration = TypeVar("NewGeneration", bound=BaseGeneration[Any])


class Replies(EngineCore):
    """The calls of `Engine` that generate."""

    def generate_tokens(
        self, token_ids: Sequence[int], params: SamplingParams | None = None, *, drafter: Drafter | None = None
    ) -> TokenGeneration:
        """Continue a list of token ids by token ids: `generate` for models without a tokenizer, and for scripts.

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id; or there are stop strings; or a drafter
                where the backend has no use for one.
        """
        started = time.perf_counter()
        checked_params = _checked(params)
        if checked_params.stop:
            raise OptionError("Stop strings need text; use generate, or leave them out of generate_tokens.")
        request = self._request(self._open_context().checked(token_ids, used=0), checked_params, started, drafter)

        def start(reused: int) -> TokenGeneration:
            return TokenGeneration(lambda state: self._token_loop(state, request, reused), self._calls)

        return self._begin(request, start)

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, drafter: Drafter | None = None
    ) -> Generation:
        """Continue a text, or a list of token ids. What the KV cache already holds of it is not computed again.

        There is one KV cache, so a new generation interrupts the one before.

        Args:
            prompt: the text, or its token ids.
            params: how tokens are sampled, and when the reply ends.
            drafter: what proposes tokens in place of prompt lookup or a draft model (docs/speculation.md).

        Raises:
            ContextError: the prompt leaves no room for a token.
            OptionError: the prompt is empty, or holds an unknown token id; or there is a drafter where the backend has
                no use for one.
        """
        started = time.perf_counter()
        detokenizer = self.text.stream()
        prompt = self._open_context().checked(self.text.encode(prompt) if isinstance(prompt, str) else prompt, used=0)
        for token in prompt:
            detokenizer.push(token)  # some tokenizers write a space before every word but the prompt's first
        return self._generate(prompt, detokenizer, params, started, drafter)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        drafter: Drafter | None = None,
    ) -> Generation:
        """Reply to a conversation.

        Args:
            messages: ``{"role": ..., "content": ...}`` each, in the shape of OpenAI's interface; roles are system,
                developer, user, assistant and tool. The content is a text or a list of text parts.
            params: how tokens are sampled, and when the reply ends.
            template_variables: what the model's chat template may be told besides, such as
                ``{"enable_thinking": False}`` or ``{"tools": [...]}``; plain data.
            drafter: as of `generate`.

        Raises:
            TextError: the model has no chat template, or the template refuses the messages or fails on them.
            OptionError: a template variable has a reserved name, or is no plain data; or as in `generate`.
            ContextError: the conversation leaves no room for a token.
        """
        started = time.perf_counter()
        prompt = self._open_context().checked(self.text.encode_chat(messages, template_variables), used=0)
        return self._generate(prompt, self.text.stream(), params, started, drafter)

    def chat_tokens(self, token_ids: Sequence[int], params: SamplingParams | None = None) -> Generation:
        """`chat` with a conversation that `text.encode_chat` has made token ids.

        Unlike after `generate`, the reply begins a text: tokenizers that mark a space before every word write none
        before its first.

        Raises:
            ContextError: the conversation leaves no room for a token.
            OptionError: it is empty, or holds an unknown token id.
        """
        started = time.perf_counter()
        return self._generate(self._open_context().checked(token_ids, used=0), self.text.stream(), params, started)

    def _generate(
        self,
        prompt: list[int],
        detokenizer: Detokenizer,
        params: SamplingParams | None,
        started: float,
        drafter: Drafter | None = None,
    ) -> Generation:
        request = self._request(prompt, _checked(params), started, drafter)

        def start(reused: int) -> Generation:
            def pieces(state: GenerationState) -> Iterator[str]:
                return text_pieces(state, self._token_loop(state, request, reused), detokenizer, request.params)

            return Generation(pieces, self._calls)

        return self._begin(request, start)

    def _request(self, prompt: list[int], params: SamplingParams, started: float, drafter: Drafter | None) -> Request:
        eos_ids = () if params.ignore_eos else self.checkpoint.text.eos_ids
        verification, speculate = self.backend.verification, params.speculate
        if speculate == "auto" and drafter is None:
            if self._draft_model is not None and not verification.reason:
                speculate = "draft"
            elif not verification.automatic:
                speculate = "off"
        drafter = choose_drafter(speculate, drafter, verification.reason, self._step_cost, self._draft_model)
        return Request(prompt, params, eos_ids, started, self._constraint_state(params), drafter)

    def _constraint_state(self, params: SamplingParams) -> ConstraintState | None:
        if params.constraint is None:
            return None
        if not self.checkpoint.text.eos_ids:
            raise OptionError("The model has no EOS token to end a constrained reply with; leave the constraint out.")
        return params.constraint.start(self.token_table)

    def _token_loop(self, state: GenerationState, request: Request, reused: int) -> Iterator[int]:
        """The loop that generates; refers to the engine, which therefore lives as long as its generation runs."""
        context, loop = self._open_context(), token_loop
        if device_chooses(context, request):
            loop = overlapped_loop
        elif needs_logits(request):
            loop = host_sampled_loop
        yield from loop(state, context, request, reused)

    def _begin(self, request: Request, start: Callable[[int], NewGeneration]) -> NewGeneration:
        """The generation that `start` returns, given how much of the prompt is in the KV cache already."""

        def begin() -> NewGeneration:
            context = self._open_context()
            self._end_generation()
            if request.params.prompt_logprobs is None:
                reused = context.rewind_to_common_prefix(request.prompt)
            else:  # the KV cache has no logits
                context.rewind(reused := 0)
            generation = start(reused)
            self._generation = weakref.ref(generation)
            return generation

        return self._calls.run(begin)


def _checked(params: SamplingParams | None) -> SamplingParams:
    """The caller's options, or the default ones."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise OptionError(f"params is {quote(params)}; give SamplingParams(...), or nothing.")
    return params
