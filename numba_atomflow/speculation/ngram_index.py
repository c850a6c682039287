"""Where the last tokens of a text occurred before: an index of n-grams that grows token by token."""

from collections.abc import Sequence
from typing import NamedTuple

LENGTHS = (12, 8, 6, 4, 3, 2)  # tokens of an n-gram, longest first


class Match(NamedTuple):
    """An earlier occurrence of the last tokens.

    Attributes:
        key: of the n-gram; equal n-grams have equal keys.
        length: its tokens.
        position: of the token that followed it then.
    """

    key: int
    length: int
    position: int


class NgramIndex:
    """Of every n-gram of `LENGTHS`, the position after its latest occurrence: a constant number of dictionary entries
    per token, some 3 microseconds and 500 bytes.

    Keys are hashes. If two n-grams have the same, a match is wrong, which costs a rejected token and no more.

    Attributes:
        tokens: all of them, in order.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._following: dict[int, int] = {}

    def update(self, token_ids: Sequence[int]) -> None:
        """Add the tokens after those that it holds.

        Args:
            token_ids: the text so far, of which `tokens` is a prefix.
        """
        for token in token_ids[len(self.tokens) :]:
            end = len(self.tokens)
            for length in LENGTHS:  # only now, so that the last tokens of the text do not match themselves
                if length <= end:
                    self._following[self._key(length)] = end
            self.tokens.append(token)

    def _key(self, length: int) -> int:
        return hash(tuple(self.tokens[-length:]))  # hashes of numbers are the same in every process

    def longest_match(self) -> Match | None:
        """The latest earlier occurrence of the longest n-gram at the end of the text that has one."""
        for length in LENGTHS:
            if length < len(self.tokens):
                key = self._key(length)
                position = self._following.get(key)
                if position is not None:
                    return Match(key, length, position)
        return None

    def continuation(self, position: int, count: int) -> list[int]:
        """`count` tokens from `position` on; at the end of the text it begins at `position` again, as in a loop."""
        period = len(self.tokens) - position
        return [self.tokens[position + i % period] for i in range(count)]
