"""Conversations in which special tokens that a message spells are text, and only those of the template are tokens.

Otherwise the message "<|im_end|><|im_start|>system ..." ends itself and speaks for the system. Spellings are taken out
of the messages before the template is rendered, as two characters each: a mark that the conversation does not contain,
and one that stands for the token. The rendered text is split at the special tokens that the template has written, as
the tokenizers library splits it, and what lies between is encoded with the spellings back in place as plain text.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from numba_atomflow.errors import TextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MARKS = tuple(chr(0xFDD0 + i) for i in range(32))  # noncharacters of Unicode: no text has a use for them
_FIRST_STAND_IN = 0x100000  # private use
_MOST_TOKENS = 65_000  # stand-ins of one plane
_DEEPEST = 80  # levels of lists and mappings; chat templates take 64


class _Special(NamedTuple):
    """A special token, and whether it swallows the blanks beside it."""

    token_id: int
    lstrip: bool
    rstrip: bool


class SpecialAsText:
    """Of one tokenizer.

    Raises:
        TextError: it has more special tokens than stand-ins.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._specials = {
            token.content: _Special(token_id, token.lstrip, token.rstrip)
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        if len(self._specials) > _MOST_TOKENS:
            raise TextError(f"The model's tokenizer has {len(self._specials)} special tokens; fetch the model again.")
        self._spellings = list(self._specials)
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._first, self._later = _plain_tokenizers(tokenizer)

    def escape(self, value: Any) -> "Escaped":
        """Plain data without the spellings of special tokens.

        Raises:
            TextError: it contains every mark.
        """
        text = json.dumps(value, ensure_ascii=False)
        mark = next((mark for mark in _MARKS if mark not in text), None)
        if mark is None:
            raise TextError("The conversation holds all noncharacters U+FDD0 to U+FDEF; leave one of them out.")
        stand_ins = {spelling: mark + chr(_FIRST_STAND_IN + i) for i, spelling in enumerate(self._spellings)}

        def replaced(value: Any, depth: int) -> Any:
            if isinstance(value, str):
                return self._pattern.sub(lambda found: stand_ins[found[0]], value)
            if depth > _DEEPEST:
                return value
            if isinstance(value, Mapping):
                return {replaced(key, depth + 1): replaced(item, depth + 1) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [replaced(item, depth + 1) for item in value]
            return value

        return Escaped(replaced(value, 0), mark)

    def encode(self, rendered: str, mark: str) -> list[int]:
        """Token ids of a text that a template has made of escaped data."""
        ids: list[int] = []
        end, strip_next = 0, False
        for found in self._pattern.finditer(rendered):
            special = self._specials[found[0]]
            ids += self._plain(rendered[end : found.start()], mark, end == 0, strip_next, special.lstrip)
            ids.append(special.token_id)
            end, strip_next = found.end(), special.rstrip
        return ids + self._plain(rendered[end:], mark, end == 0, strip_next, False)

    def _plain(self, text: str, mark: str, is_first: bool, lstrip: bool, rstrip: bool) -> list[int]:
        """Token ids of a text between special tokens."""
        text = text.lstrip() if lstrip else text
        text = text.rstrip() if rstrip else text
        text = re.sub(f"{mark}(.)", self._spelled, text, flags=re.DOTALL).replace(mark, "")
        if not text:
            return []
        tokenizer = self._first if is_first else self._later
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _spelled(self, found: re.Match[str]) -> str:
        number = ord(found[1]) - _FIRST_STAND_IN
        return self._spellings[number] if 0 <= number < len(self._spellings) else found[1]


class Escaped(NamedTuple):
    """Plain data with stand-ins, and the mark before each of them."""

    value: Any
    mark: str


def _plain_tokenizers(tokenizer: "Tokenizer") -> tuple["Tokenizer", "Tokenizer"]:
    """Copies that take special tokens for text: for the beginning of a text, and for what follows a special token.

    They differ where the tokenizer puts a space before the first word of a text alone.
    """
    from tokenizers import Tokenizer

    record = tokenizer.to_str()
    later = record.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    copies = Tokenizer.from_str(record), Tokenizer.from_str(later)
    for copy in copies:
        copy.encode_special_tokens = True
    return copies
