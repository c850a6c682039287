"""Grammars matched token by token with llguidance (extra `guided`).

The library keeps an Earley parser over the bytes of the reply, and computes in about 0.1 ms which tokens of the
vocabulary may follow. It is given the vocabulary as bytes, so any tokenizer of a checkpoint serves.
"""

import re
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import escape_controls
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.token_table import TokenTable

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MOST_CHARACTERS = 1 << 16  # of a schema or grammar: a longer one could take seconds to compile
_MAX_REASON = 200  # characters
_SENTINEL = "\x02"  # before a text: no tokenizer joins it to what follows

_tokenizers: WeakKeyDictionary[TokenTable, "LLTokenizer"] = WeakKeyDictionary()


class Matcher:
    """The state of a grammar: a `ConstraintState`.

    Args:
        grammar: in llguidance's own format, as `LLMatcher.grammar_from_*` returns it.
        tokens: of the model.
        what: the grammar's name in a message: "The JSON schema".

    Raises:
        OptionError: the grammar is malformed, too complex, or no text satisfies it.
    """

    def __init__(self, grammar: str, tokens: TokenTable, what: str) -> None:
        from llguidance import LLMatcher, LLParserLimits

        self._what = what
        limits = LLParserLimits(verbose_errors=False)
        self._matcher = LLMatcher(_tokenizer(tokens), grammar, log_level=0, limits=limits)
        self._mask = np.zeros(-(-tokens.vocabulary // 32), "<u4")
        self._check()
        self.allowed()
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            raise OptionError(f"{what} cannot be satisfied by any text; change it.")

    def allowed(self) -> NDArray[np.uint32]:
        """Tokens that may come next, as `ConstraintState.allowed`; valid until the next call.

        Raises:
            OptionError: the grammar is too complex to be matched further.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, token: int) -> None:
        """The reply goes on with this token.

        Raises:
            OptionError: it was not allowed, or the grammar is too complex to be matched further.
        """
        self._matcher.consume_token(token)
        self._check()

    def is_complete(self) -> bool:
        """Whether the reply matches the grammar as it is."""
        accepting: bool = self._matcher.is_accepting()
        return accepting

    def _check(self) -> None:
        if self._matcher.is_error():
            raise refused(self._what, self._matcher.get_error())


def refused(what: str, reason: str) -> OptionError:
    """The error for a grammar that the library refuses for this reason."""
    reason = re.split("<state>|<backtrace>", reason, maxsplit=1)[0]
    lines = [line.strip() for line in reason.splitlines()]
    text = escape_controls(" ".join(line for line in lines if line.strip("^ ")))
    if len(text) > _MAX_REASON:
        text = text[: _MAX_REASON - 3] + "..."
    return OptionError(f"{what} cannot be used ({text or 'it is too complex'}); change it.")


def check_length(text: str, what: str, most: int = MOST_CHARACTERS) -> None:
    """Refuse a schema or grammar of more than `most` characters.

    Raises:
        OptionError: it is longer.
    """
    if len(text) > most:
        has = "have" if what.endswith("s") else "has"
        raise OptionError(f"{what} {has} {len(text)} characters; give at most {most}.")


def require_llguidance() -> Any:
    """The library.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise OptionError("Constraints need the package llguidance: pip install 'numba-atomflow[guided]'.") from error
    return llguidance


def _tokenizer(tokens: TokenTable) -> "LLTokenizer":
    """The library's index of a vocabulary, made once per model: 0.2 s for 50,000 tokens."""
    tokenizer = _tokenizers.get(tokens)
    if tokenizer is None:
        from llguidance import LLTokenizer

        vocabulary: Any = _Vocabulary(tokens)
        tokenizer = LLTokenizer(vocabulary, n_vocab=tokens.vocabulary, eos_token=list(tokens.eos_ids))
        _tokenizers[tokens] = tokenizer
    return tokenizer


class _Vocabulary:
    """What `LLTokenizer` asks of a tokenizer: attributes by these names, and a call that encodes a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: TokenTable) -> None:
        self._codec: TextCodec = tokens.codec
        self.eos_token_id = tokens.eos_ids[0]
        self.special_token_ids = tokens.special_ids
        self.tokens = tokens.spellings
        self._special = frozenset(tokens.special_ids)
        self._ids = {text: token for token, text in enumerate(self.tokens) if text and token not in self._special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are the text's: those of the tokenizer, if it neither adds a space before a text, as
        SentencePiece does, nor finds a special token in it.
        """
        wanted = text.encode()
        for before in ("", _SENTINEL):
            ids = self._codec.encode(before + text, add_special=False)
            while ids and len(self._bytes(ids)) > len(wanted):
                del ids[0]
            if self._bytes(ids) == wanted:
                return ids
        return self._longest_first(wanted)

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids if token not in self._special)

    def _longest_first(self, text: bytes) -> list[int]:
        """Tokens of a text, each the longest that fits; bytes that no token has are left out."""
        ids, start = [], 0
        while start < len(text):
            ends = range(min(start + self._longest, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is not None:
                ids.append(self._ids[text[start:end]])
            start = start + 1 if end is None else end
        return ids
