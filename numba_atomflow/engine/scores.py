"""Scores of given continuations."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from numba_atomflow.engine.core import EngineCore
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.scoring import Score, checked_pair, score_pairs
from numba_atomflow.utils.progress import Progress


class Scores(EngineCore):
    """The calls of `Engine` that score texts."""

    def score(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> Score:
        """How likely a continuation is after a prompt: two texts, or two lists of token ids.

        What the KV cache holds of the prompt is not computed again. A generation in progress ends here.

        Where the texts meet, the tokens are those of lm-evaluation-harness (`TextCodec.encode_pair`).

        Raises:
            ContextError: they do not fit into the context.
            OptionError: one is empty, or holds an unknown token id, or they are of different kinds.
        """
        return self.score_many([(prompt, continuation)])[0]

    def score_many(
        self,
        pairs: Iterable[tuple[str | Sequence[int], str | Sequence[int]]],
        progress: Progress | None = None,
    ) -> list[Score]:
        """`score` of many prompts and continuations, in order. What several of them begin with is computed once.

        The order of the pairs does not matter; scores may differ from those of `score` by the rounding of float32.

        Args:
            pairs: of a prompt and a continuation each.
            progress: called with token sequences done, and in all.

        Raises:
            ContextError, OptionError: as `score`; OptionError also for what is no list of pairs.
        """

        def score_many() -> list[Score]:
            context = self._open_context()
            checked = [checked_pair(context, *self._encoded_pair(*pair)) for pair in _pairs(pairs)]
            self._end_generation()
            return score_pairs(context, checked, progress)

        return self._calls.run(score_many)

    def _encoded_pair(
        self, prompt: str | Sequence[int], continuation: str | Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        if isinstance(prompt, str) and isinstance(continuation, str):
            return self.text.encode_pair(prompt, continuation)
        if isinstance(prompt, str) or isinstance(continuation, str):
            raise OptionError("A prompt and its continuation must both be texts, or both be lists of token ids.")
        return prompt, continuation


def _pairs(given: object) -> Iterator[tuple[Any, Any]]:
    """The pairs of an argument that came from a caller."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise OptionError(f"score_many takes pairs of a prompt and a continuation, not {quote(given)}.")
    for pair in given:
        values = tuple(pair) if isinstance(pair, Iterable) and not isinstance(pair, str) else ()
        if len(values) != 2:
            raise OptionError(f"A pair to score is a prompt and a continuation, not {quote(pair)}.")
        yield values
