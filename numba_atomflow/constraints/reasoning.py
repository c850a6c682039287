"""A constraint on the answer of a model that reasons first: between ``<think>`` and ``</think>`` all is free."""

from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.constraints.base import Constraint, ConstraintState
from numba_atomflow.text.reasoning import CLOSING, OPENING
from numba_atomflow.text.token_table import TokenTable

_OPENING, _CLOSING = OPENING.encode(), CLOSING.encode()

Mask = NDArray[np.uint32]


@dataclass(frozen=True)
class AfterReasoning:
    """The reply may begin with reasoning; what follows satisfies another constraint.

    `text.reasoning.split_reasoning` separates the two. White space after the reasoning is not part of the answer.

    Args:
        constraint: on the answer.
        opened: the prompt ends with the opening tag, so the reply begins inside its reasoning.
    """

    constraint: Constraint
    opened: bool = False

    def start(self, tokens: TokenTable) -> "AfterReasoningState":
        """The state at the beginning of a reply."""
        return AfterReasoningState(self.constraint.start(tokens), tokens, self.opened)


class AfterReasoningState:
    """A `ConstraintState`: free until the closing tag, then that of the answer."""

    def __init__(self, answer: ConstraintState, tokens: TokenTable, opened: bool) -> None:
        self._answer, self._spellings = answer, tokens.spellings
        self._masks = _masks(tokens)
        self._place: Literal["start", "opening", "reasoning", "between", "answer"] = "reasoning" if opened else "start"
        self._text = b""  # of the opening tag so far; of the reasoning, its end

    def allowed(self) -> Mask | None:
        """Tokens that may come next, as `ConstraintState.allowed`."""
        match self._place:
            case "start":
                return self._answer_or(self._masks.opening[0])
            case "opening":
                return self._masks.opening[len(self._text)]
            case "reasoning":
                return self._masks.reasoning[_overlap(self._text)]
            case "between":
                return self._answer_or(self._masks.white_space)
        return self._answer.allowed()

    def accept(self, token: int) -> None:
        """The reply goes on with this token."""
        spelling = self._spellings[token]
        if self._place in ("start", "between") and self._answer_allows(token):
            self._place = "answer"
        if self._place == "answer":
            self._answer.accept(token)
        elif self._place == "between":
            self._place = "answer"  # after one token of white space
        elif self._place == "reasoning":
            self._text = (self._text + spelling)[-(len(_CLOSING) + len(spelling)) :]
            self._place = "between" if _CLOSING in self._text else "reasoning"
        else:
            self._text += spelling
            self._place = "opening"
            if self._text.startswith(_OPENING):
                self._place, self._text = "reasoning", self._text.removeprefix(_OPENING)

    def is_complete(self) -> bool:
        """Whether the answer is complete."""
        return self._place in ("start", "between", "answer") and self._answer.is_complete()

    def _answer_or(self, others: Mask) -> Mask | None:
        mask = self._answer.allowed()
        return None if mask is None else mask | others

    def _answer_allows(self, token: int) -> bool:
        mask = self._answer.allowed()
        return mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & 1)


@dataclass(frozen=True)
class _Masks:
    """Tokens for each place.

    Attributes:
        opening: those that continue the opening tag, by how much of it is there.
        reasoning: all but EOS and those in which an answer begins, by how much of the closing tag is there.
        white_space: those of white space.
    """

    opening: list[Mask]
    reasoning: list[Mask]
    white_space: Mask


_by_model: WeakKeyDictionary[TokenTable, _Masks] = WeakKeyDictionary()


def _masks(tokens: TokenTable) -> _Masks:
    """The masks of a model, made once."""
    masks = _by_model.get(tokens)
    if masks is None:
        spellings = list(enumerate(tokens.spellings))
        opening = [
            [token for token, text in spellings if text and rest.startswith(text)]
            for rest in (_OPENING[length:] for length in range(len(_OPENING)))
        ]
        reasoning = []
        for length in range(len(_CLOSING)):
            closing = _CLOSING[length:]
            ends = [token for token, text in spellings if closing in text and _holds_answer(text, length)]
            reasoning.append(np.invert(_mask_of([*tokens.eos_ids, *ends], tokens.vocabulary)))
        white_space = [token for token, text in spellings if text and text.isspace()]
        masks = _Masks(
            [_mask_of(ids, tokens.vocabulary) for ids in opening],
            reasoning,
            _mask_of(white_space, tokens.vocabulary),
        )
        _by_model[tokens] = masks
    return masks


def _holds_answer(text: bytes, length: int) -> bool:
    """Whether a token after `length` bytes of the closing tag completes it and goes on with other than white space."""
    _, tag, rest = (_CLOSING[:length] + text).partition(_CLOSING)
    return bool(tag and rest.strip())


def _overlap(text: bytes) -> int:
    """Bytes at the end of the reasoning that may be the beginning of the closing tag."""
    return next(length for length in range(len(_CLOSING) - 1, -1, -1) if text.endswith(_CLOSING[:length]))


def _mask_of(tokens: list[int], vocabulary: int) -> Mask:
    bits = np.zeros(-(-vocabulary // 32) * 32, np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view("<u4")
