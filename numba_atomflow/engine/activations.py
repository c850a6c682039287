"""Activations, recorded and changed: hooks for research."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numba_atomflow.backends.hooks import Edit, edits_of
from numba_atomflow.context import ActiveEdits, Context
from numba_atomflow.engine.core import EngineCore
from numba_atomflow.errors import OptionError
from numba_atomflow.model.activations import select


class Activations(EngineCore):
    """The calls of `Engine` that record and change activations."""

    def capture(self, prompt: str | Sequence[int], activations: str | Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """Run a prompt and return activations of all its tokens. Afterwards the KV cache holds the prompt.

        Args:
            prompt: a text or token ids, of any length that fits the context.
            activations: names such as "layer.3.attention", or globs such as "layer.*.output".

        Returns:
            float32 [tokens, width] by name; inside of `edit`, what the edits have made of them.

        Raises:
            OptionError: an unknown name or token, or an empty prompt.
            ContextError: the prompt does not fit.
        """

        def capture() -> dict[str, NDArray[np.float32]]:
            context = self._open_context()
            chosen = select(activations, self.geometry)
            ids = context.checked(self.text.encode(prompt) if isinstance(prompt, str) else prompt, used=0)
            self._end_generation()
            return context.capture(ids, chosen)

        return self._calls.run(capture)

    def unembed(self, rows: ArrayLike) -> NDArray[np.float32]:
        """Final norm and LM head of any rows of a residual stream, such as the output of a layer in the middle.

        Edits have no effect here. A generation in progress goes on afterwards.

        Args:
            rows: numbers [n, hidden], n at least 1.

        Returns:
            Logits, float32 [n, V].

        Raises:
            OptionError: `rows` has another shape, or no finite numbers.
        """
        hidden, array = self.geometry.hidden, np.asarray(rows)
        if array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != hidden or not len(array):
            raise OptionError(f"rows is {array.dtype} {list(array.shape)}; it must be numbers of shape [n, {hidden}].")
        if not np.isfinite(array).all():
            raise OptionError("rows holds NaN or infinity; give finite numbers.")
        return self._calls.run(lambda: self._open_context().unembed(array.astype(np.float32)))

    @contextmanager
    def edit(self, edits: Mapping[str, Edit]) -> Iterator[None]:
        """Within the block, change activations while prompts and generated tokens run: steering, ablation, patching.

            with engine.edit({"layer.12.output": lambda rows, position: rows + direction}):
                print(engine.generate("Once upon a time").finish().text)

        `generate` and `chat` compute their prompt anew under the edits; `feed` continues what the KV cache holds. At
        the end of the block, or on an exception, what was computed under the edits is dropped from the KV cache, and a
        generation in progress ends. Blocks may be nested: outer edits come first.

        Args:
            edits: functions by name or glob. They get rows float32 [tokens, width], read-only, and
                the position of the first, and return rows of the same shape, or None to change nothing. They must not
                call the engine.

        Raises:
            OptionError: an unknown activation, or one that cannot be edited; a function returns anything else.
        """

        def begin() -> tuple[Context, ActiveEdits]:
            context = self._open_context()
            chosen = edits_of(edits, self.geometry)
            self._end_generation()
            return context, context.begin_edits(chosen)

        context, active = self._calls.run(begin)

        def end() -> None:
            if self._context is not context:  # closed
                return
            self._close_generation()
            context.end_edits(active)

        try:
            yield
        finally:
            self._calls.wait_and_run(end)
