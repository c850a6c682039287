"""Draft models: an engine that proposes tokens, and the one that has it propose."""

import time
from collections.abc import Sequence

from numba_atomflow.backends.base import Backend
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.context import Context
from numba_atomflow.engine.core import EngineCore
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.sampling import most_likely_token
from numba_atomflow.speculation.draft_model import DraftModel, GreedyTokens
from numba_atomflow.text.same_tokens import difference_of_tokens
from numba_atomflow.utils.arguments import whole_number, whole_numbers
from numba_atomflow.utils.progress import Progress


class Drafts(EngineCore):
    """The calls of `Engine` for speculative decoding with a draft model."""

    _draft: "Drafts | None" = None
    _closes_draft = False

    @property
    def draft(self) -> "Drafts | None":
        """The engine of the draft model, if there is one."""
        return self._draft

    def use_draft(self, draft: "Drafts | None") -> None:
        """Let the model of another engine propose tokens from now on; None: no other model. A generation in progress
        ends here.

        That engine belongs to the caller, who may use it for other texts meanwhile and closes it; its KV cache then
        holds what it was used for last. While another thread uses it, a reply that asks it for tokens raises
        EngineBusyError. One that `load` has made for this engine still is this engine's when it is given again.

        Raises:
            OptionError: it is no engine, or this one; or this backend cannot check several tokens in one step; or the
                models' tokens differ.
            TextError: a tokenizer cannot be used.
        """
        if draft is self:
            raise OptionError("An engine cannot be its own draft model; load the model twice.")
        model = None
        if draft is not None:
            if not isinstance(draft, Drafts):
                raise OptionError(f"draft is {quote(draft)}; it must be an engine.")
            check_several_tokens(self.backend)
            check_same_tokens(self.checkpoint, draft.checkpoint)
            ratio = draft.weight_bytes_per_token / self.weight_bytes_per_token
            model = DraftModel(draft, self.geometry.vocabulary, self._step_cost, ratio)

        def use() -> None:
            self._end_generation()
            if draft is not self._draft:
                self._close_draft()
            self._draft, self._draft_model = draft, model

        self._calls.run(use)

    def _own_draft(self, draft: "Drafts") -> None:
        """As `use_draft`, and close that engine with this one."""
        self.use_draft(draft)
        self._closes_draft = True

    def _close(self) -> None:
        super()._close()
        self._close_draft()

    def _close_draft(self) -> None:
        if self._closes_draft and self._draft is not None:
            self._draft.close()
        self._closes_draft = False

    def warm_up(self, progress: Progress | None = None) -> None:
        """As `EngineCore.warm_up`, and the same for the draft model and the steps that check its tokens."""
        super().warm_up(progress)
        if self._draft is not None:
            self._draft.warm_up(progress)
            self._calls.run(self._check_once)

    def _check_once(self) -> None:
        """Run a step of as many tokens as possible: on a GPU the first of them compiles their kernels."""
        context = self._open_context()
        context.verify([0] * min(context.backend.verification.width, context.max_seq_len))
        context.rewind(0)

    def continue_greedily(self, token_ids: Sequence[int], count: int) -> GreedyTokens:
        """The `count` most likely tokens after a text: what a draft model proposes.

        What the KV cache already holds of the text is not computed again. No step runs ahead, so that on a GPU nothing
        is left to run beside the steps of another engine. A generation in progress ends here.

        Args:
            token_ids: whole numbers from 0 on, at least one of them; quickest as a list, of which only what the KV
                cache does not hold is checked.
            count: at least 1.

        Returns:
            The tokens; none if a token of the text is beyond this model's vocabulary.

        Raises:
            OptionError: there are no tokens, or one is no whole number from 0 on, or none are asked for.
            ContextError: text and tokens, without the last, do not fit into the KV cache, where they are kept.
        """
        count = whole_number("count", count)
        if not isinstance(token_ids, list):
            token_ids = whole_numbers(token_ids)
        if len(token_ids) < 1 or count < 1:
            raise OptionError(
                f"There are {len(token_ids)} tokens to continue by {quote(count)}; give at least one of each."
            )
        if len(token_ids) + count - 1 > self.max_seq_len:
            raise ContextError(
                f"{len(token_ids)} tokens and {quote(count - 1)} after them do not fit into the context, which holds "
                f"{self.max_seq_len}; ask for fewer."
            )

        def generate() -> GreedyTokens:
            started = time.perf_counter()
            context = self._open_context()
            self._end_generation()
            rest = whole_numbers(token_ids[context.rewind_to_common_prefix(token_ids) :])
            if min(rest) < 0:
                raise OptionError(f"Token {quote(min(rest))} does not exist; token ids are whole numbers from 0 on.")
            if max(rest) >= context.vocabulary:
                return GreedyTokens([], 0, 0.0)
            tokens = [_next(context, rest)]
            first_seconds = time.perf_counter() - started
            while len(tokens) < count:
                tokens += context.verify_greedy(tokens[-1:])
            return GreedyTokens(tokens, len(rest), first_seconds)

        return self._calls.run(generate)


def _next(context: Context, tokens: Sequence[int]) -> int:
    """Feed tokens; the most likely one after them."""
    return most_likely_token(context.feed(tokens)) if len(tokens) > 1 else context.verify_greedy(tokens)[0]


def check_several_tokens(backend: Backend) -> None:
    """Raise if a draft model's tokens cannot be checked.

    Raises:
        OptionError: the backend cannot check several tokens in one step.
    """
    obstacle = backend.verification.reason
    if obstacle:
        raise OptionError(
            f"A draft model is of no use, because the backend cannot check several tokens in one step: {obstacle}; "
            "leave it out."
        )


def check_same_tokens(model: Checkpoint | RandomModel, draft: Checkpoint | RandomModel) -> None:
    """Raise if a draft model has other tokens than the model that checks them.

    Raises:
        OptionError: it has.
        TextError: a tokenizer cannot be used.
    """
    difference = difference_of_tokens(model.text, draft.text)
    if not difference and model.text.tokenizer_json is None and model.geometry.vocabulary != draft.geometry.vocabulary:
        difference = "they have no tokenizers, and vocabularies of different sizes"
    if difference:
        raise OptionError(
            f"{short(draft.path.name)} cannot be the draft model of {short(model.path.name)}: {difference}; choose one "
            "of the same family."
        )
