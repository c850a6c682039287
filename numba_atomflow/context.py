"""The tokens that the KV cache holds, and the steps that put them there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Backend
from numba_atomflow.backends.hooks import Edit, EditedBackend, Recorder, RunningEdits, prepare_edits, unembed
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.activations import Activation
from numba_atomflow.model.step import NO_LOGITS, Head
from numba_atomflow.utils.arguments import whole_number, whole_numbers

DEFAULT_MAX_SEQ_LEN = 4096  # positions, where the model allows as many
_BLOCK = 256  # tokens that are compared at once


class Context:
    """The KV cache of a backend, seen as the tokens in it.

    Attributes:
        token_ids: in order; the next one is written at position len(token_ids).
        vocabulary: tokens of the model. max_seq_len: positions of the KV cache.
    """

    def __init__(self, backend: Backend, geometry: ModelGeometry, max_seq_len: int) -> None:
        self.backend, self._geometry, self.max_seq_len = backend, geometry, max_seq_len
        self.vocabulary = geometry.vocabulary
        self.token_ids: list[int] = []
        self._unedited = backend
        self._edits: list[ActiveEdits] = []  # outer ones first

    @property
    def is_full(self) -> bool:
        """Whether no further token fits."""
        return len(self.token_ids) >= self.max_seq_len

    def checked(self, token_ids: Sequence[int], used: int, what: str = "prompt") -> list[int]:
        """The tokens as a list.

        Args:
            used: positions before theirs.
            what: they are, for messages.

        Raises:
            ContextError: they do not fit after `used` others.
            OptionError: there are none, or one is not a token of this model.
        """
        ids = whole_numbers(token_ids)
        if not ids:
            raise OptionError(f"The {what} is empty; give at least one token.")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.vocabulary:
                raise OptionError(f"Token {quote(token)} does not exist; the vocabulary has {self.vocabulary} tokens.")
        if len(ids) > self.max_seq_len - used:
            taken = f", of which {used} are taken" if used else ""
            raise ContextError(
                f"The {what} has {len(ids)} tokens, but the context holds {self.max_seq_len}{taken}; "
                f"shorten it or raise --max-seq-len (the model allows {self._geometry.max_positions})."
            )
        return ids

    def rewind(self, position: int) -> None:
        """Drop every token from `position` on.

        Raises:
            ContextError: there are fewer tokens.
        """
        if not 0 <= position <= len(self.token_ids):
            raise ContextError(
                f"The context holds {len(self.token_ids)} tokens; it cannot be rewound to {quote(position)}."
            )
        del self.token_ids[position:]
        self.backend.seek(position)
        for edits in self._edits:
            edits.start = min(edits.start, position)

    def rewind_to_common_prefix(self, token_ids: Sequence[int]) -> int:
        """Keep what the KV cache and a prompt share, and return its length: the hit of prefix caching.

        At least one token of the prompt is left to be fed. Under edits, nothing is kept that was computed without.
        """
        if self._edits and self._edits[-1].start > 0:
            token_ids = ()
        shared = _common_prefix(self.token_ids, token_ids[:-1])
        self.rewind(shared)
        return shared

    def adopt(self, token_ids: Sequence[int]) -> None:
        """Take note of tokens whose keys and values were put into the empty KV cache, not computed here."""
        self.token_ids.extend(token_ids)
        self.backend.seek(len(self.token_ids))
        for edits in self._edits:
            edits.start = len(self.token_ids)

    def prefill(self, token_ids: Sequence[int], head: Head) -> None:
        """Feed a prompt in chunks; only the last chunk computes a head."""
        backend, chunk = self.backend, self.backend.prefill_chunk
        backend.seek(len(self.token_ids))  # a step that was interrupted (Ctrl-C) may have left it elsewhere
        for start in range(0, len(token_ids), chunk):
            tokens = token_ids[start : start + chunk]
            is_last = start + len(tokens) == len(token_ids)
            backend.prefill(tokens, head if is_last else NO_LOGITS)
            self.token_ids.extend(tokens)

    def feed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens; the logits [V] of the last."""
        self.prefill(token_ids, NO_LOGITS)
        return self.last_logits(len(token_ids))

    def last_logits(self, fed: int) -> NDArray[np.float32]:
        """Logits [V] of the last of the `fed` tokens just fed, with the bits of a decode step's."""
        row = (fed - 1) % self.backend.prefill_chunk
        logits: NDArray[np.float32] = self.backend.logits(row, row + 1)[0]
        return logits

    def feed_all_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Feed tokens; the logits [len(token_ids), V] of all of them."""
        return np.concatenate(list(self.feed_by_chunks(token_ids)))

    def feed_by_chunks(self, token_ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """Feed tokens; the logits [n, V] of one chunk after the other, of all tokens from `first` on."""
        chunk = self.backend.prefill_chunk
        for start in range(0, len(token_ids), chunk):
            tokens = token_ids[start : start + chunk]
            self.prefill(tokens, NO_LOGITS)
            skipped = max(first - start, 0)
            if skipped < len(tokens):
                yield self.backend.logits(skipped, len(tokens))

    def capture(self, token_ids: Sequence[int], chosen: Sequence[Activation]) -> dict[str, NDArray[np.float32]]:
        """Feed a prompt from position 0 on; its activations [len(token_ids), width] by name."""
        backend, chunk = self.backend, self.backend.observed_chunk
        self.rewind(0)
        recorder = Recorder(backend, chosen, len(token_ids))
        for start in range(0, len(token_ids), chunk):
            tokens = token_ids[start : start + chunk]
            recorder.begin(start)
            backend.observe(tokens, NO_LOGITS, recorder)
            if any(activation.in_head for activation in chosen):
                backend.logits(0, len(tokens), recorder)
            self.token_ids.extend(tokens)
        return recorder.arrays

    def unembed(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [n, V] of rows [n, hidden] of a residual stream, without edits."""
        return unembed(self._unedited, rows)

    def begin_edits(self, edits: Sequence[tuple[Activation, Edit]]) -> "ActiveEdits":
        """Run steps under these edits too, until `end_edits`."""
        active = ActiveEdits(prepare_edits(self._unedited, edits), len(self.token_ids))
        self._edits.append(active)
        try:
            self._apply_edits()
        except BaseException:
            self.end_edits(active)
            raise
        return active

    def end_edits(self, edits: "ActiveEdits") -> None:
        """Drop what was computed under these edits, and run steps without them."""
        self._edits.remove(edits)
        self.rewind(edits.start)
        self._apply_edits()
        edits.running.close()

    def _apply_edits(self) -> None:
        running = [active.running for active in self._edits]
        captured = self._unedited.device_edits
        if captured is not None:
            in_steps = all(block.in_steps for block in running)
            captured.capture([edit for block in running for edit in block.edits] if in_steps else [])
            captured = captured if in_steps else None
        self.backend = self._unedited
        for block in running:
            self.backend = EditedBackend(self.backend, block.edits, captured)
        self.backend.seek(len(self.token_ids))

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after the token sampled last, which then is in the context, and after proposed ones.

        Of the latter, those that are accepted are to be appended to `token_ids`. The rows are valid as long as those of
        `Backend.verify`.
        """
        self.backend.seek(len(self.token_ids))
        logits = self.backend.verify(tokens)
        self.token_ids.append(tokens[0])
        return logits

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """As `Backend.verify_greedy`, of tokens that are as those of `verify`."""
        self.backend.seek(len(self.token_ids))
        chosen = self.backend.verify_greedy(tokens)
        self.token_ids.append(tokens[0])
        return chosen

    def launch_verification(self, tokens: Sequence[int], ahead: int, *, sampled: bool) -> Callable[[], list[int]]:
        """As `Backend.launch_verification`, which must exist. Of the tokens, which are as those of `verify`, none is
        appended to `token_ids`.

        Args:
            ahead: tokens that the KV cache holds, and `token_ids` does not yet.
        """
        launch = self.backend.launch_verification
        assert launch is not None  # noqa: S101
        self.backend.seek(len(self.token_ids) + ahead)
        return launch(tokens, sampled=sampled)

    def decode(self, token: int) -> None:
        """Request the decode step that takes the token sampled last into the KV cache."""
        self.backend.decode()
        self.token_ids.append(token)


@dataclass(eq=False)
class ActiveEdits:
    """Edits that steps run under.

    Attributes:
        start: tokens in the KV cache before the first one that was computed under them.
    """

    running: RunningEdits
    start: int


def choose_max_seq_len(geometry: ModelGeometry, requested: int | None) -> int:
    """Positions of the KV cache.

    Raises:
        OptionError: `requested` is not between 1 and the model's limit.
    """
    if requested is None:
        return min(geometry.max_positions, DEFAULT_MAX_SEQ_LEN)
    positions = whole_number("max_seq_len", requested)
    if not 1 <= positions <= geometry.max_positions:
        raise OptionError(
            f"max_seq_len is {quote(positions)}; this model allows 1 to {geometry.max_positions} positions."
        )
    return positions


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the beginning that are the same: blocks of them are compared first, which is faster."""
    length = min(len(first), len(second))
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        block, other = list(first[start:end]), list(second[start:end])
        if block != other:
            pairs = zip(block, other, strict=True)
            return start + next(i for i, (token, another) in enumerate(pairs) if token != another)
    return length
