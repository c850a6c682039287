"""What all calls of an engine share: one backend with one KV cache, a call at a time; tokens in, logits out."""

import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.context import Context
from numba_atomflow.errors import ClosedError
from numba_atomflow.generation import BaseGeneration
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.speculation.draft_model import DraftModel
from numba_atomflow.speculation.step_cost import StepCost
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.utils.arguments import truth_value, whole_number
from numba_atomflow.utils.exclusive_calls import ExclusiveCalls
from numba_atomflow.utils.progress import Progress

Message = Mapping[str, Any]  # of a conversation, in the shape of OpenAI's interface


class EngineCore:
    """The calls of `Engine` that need no text, and what the others are made of."""

    def __init__(self, checkpoint: Checkpoint | RandomModel, backend: Backend, max_seq_len: int) -> None:
        self.checkpoint = checkpoint
        self._context: Context | None = Context(backend, checkpoint.geometry, max_seq_len)
        self.max_seq_len = max_seq_len
        self.load_seconds = 0.0
        self.compile_seconds = 0.0  # of them, for compiling or loading kernels; first prompts may need more
        self._step_cost = StepCost()  # as far as generations have measured it
        self._draft_model: DraftModel | None = None
        self._calls = ExclusiveCalls(survives_fork=backend.name == "cpu")
        # In progress, continuing what the KV cache holds. One that the caller has dropped cannot go on.
        self._generation: weakref.ref[BaseGeneration[Any]] | None = None

    def close(self) -> None:
        """Release the backend's memory and the mapped checkpoint; the engine cannot be used afterwards.

        A generation in progress ends; a call that runs in another thread is waited for. Closing twice is safe.
        """
        self._calls.wait_and_run(self._close)

    def _close(self) -> None:
        self._close_generation()
        context, self._context = self._context, None
        if context is not None:
            context.backend.close()
        self.checkpoint.close()

    def _close_generation(self) -> None:
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """The device that runs the model.

        Raises:
            ClosedError: the engine was closed.
        """
        return self._open_context().backend

    def _open_context(self) -> Context:
        if self._context is None:
            raise ClosedError(f"The engine of {self.checkpoint.path} was closed; load it again.")
        return self._context

    @property
    def geometry(self) -> ModelGeometry:
        """The model's shape."""
        return self.checkpoint.geometry

    @cached_property
    def text(self) -> TextCodec:
        """The model's tokenizer and chat template."""
        return TextCodec(self.checkpoint.text)

    @cached_property
    def token_table(self) -> TokenTable:
        """The model's tokens as bytes, for constraints."""
        return TokenTable(self.checkpoint.text, self.geometry.vocabulary)

    @cached_property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decode step must read."""
        return sum(op.weight_bytes for op in self.backend.step(1, SAMPLE))

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compile what only some prompts need, or load it from the cache, so that none of them waits for it.

        Empties the KV cache. For programs that must answer at once from their first request on, such as servers.

        Args:
            progress: called with what is done, the number of steps done and of all.
        """
        lengths = self.backend.prompt_lengths
        for done, length in enumerate(lengths):
            if progress:
                progress("compiling for prompts", done, len(lengths))
            self.reset()
            self.feed([0] * length)
        self.reset()
        if progress:
            progress("compiled", len(lengths), len(lengths))

    # --- tokens and logits ---------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens in the KV cache: the next one is written here."""
        return len(self.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The tokens in the KV cache (a copy)."""
        return list(self._open_context().token_ids)

    def reset(self) -> None:
        """Empty the KV cache."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Drop every token from `position` on. A generation in progress ends here.

        Raises:
            ContextError: the KV cache holds fewer tokens.
            OptionError: `position` is no whole number.
        """
        position = whole_number("position", position)

        def rewind() -> None:
            context = self._open_context()
            self._end_generation()
            context.rewind(position)

        self._calls.run(rewind)

    def feed(self, token_ids: Sequence[int], all_logits: bool = False) -> NDArray[np.float32]:
        """Run tokens through the model and keep them in the KV cache. A generation in progress ends here.

        Args:
            token_ids: at least one.
            all_logits: return the logits of every position, not only of the last.

        Returns:
            float32 [V], or [len(token_ids), V] for all of them: row i predicts the token after token_ids[i].

        Raises:
            ContextError: they do not fit after what the KV cache holds.
            OptionError: there are none, or one is not a token of this model; or `all_logits` is no bool.
        """
        every = truth_value("all_logits", all_logits)

        def feed() -> NDArray[np.float32]:
            context = self._open_context()
            ids = context.checked(token_ids, used=len(context.token_ids))
            self._end_generation()
            return context.feed_all_logits(ids) if every else context.feed(ids)

        return self._calls.run(feed)

    def _end_generation(self) -> None:
        """Interrupt a generation before the KV cache changes under it.

        Raises:
            EngineBusyError: it belongs to another thread.
        """
        generation = self._generation() if self._generation is not None else None
        if generation is not None:
            generation.interrupt()
        self._generation = None
