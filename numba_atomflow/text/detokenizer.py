"""Tokens to text, one at a time, without ever showing half a character.

A token is a run of bytes, and a character of several bytes may be spread over several tokens. So each token is turned
into its bytes, and an incremental UTF-8 decoder gives out the characters that are complete. That costs the same for
every token, however long the reply has become, and needs no second look at earlier tokens.

The bytes of a token depend on the tokenizer's decoder. Two kinds cover the Llama family: byte-level BPE, whose tokens
spell bytes in GPT-2's printable alphabet, and sentencepiece, whose tokens are text with ``▁`` for a space, plus tokens
such as ``<0xE4>`` for single bytes.
"""

import codecs
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numba_atomflow.errors import TextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable character to byte value, 256 entries.

    Bytes that print in Latin-1 stand for themselves; the others are counted off from U+0100. Source: OpenAI's GPT-2
    ``encoder.py``, kept by every byte-level BPE since.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()


@dataclass
class _Rules:
    """What a tokenizer's decoder does, reduced to rules on one token and on the start of the text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    separator: str = ""  # between tokens
    drop_in_first_token: str = ""  # a character that Metaspace leaves out of the first token
    strip: str = ""  # a character removed up to `strip_count` times from the start of the text
    strip_count: int = 0


class TokenBytes:
    """The bytes that each token of a tokenizer stands for.

    Raises:
        TextError: the tokenizer's decoder is of a kind that no Llama-family model uses.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        # The decoder's JSON is what it pickles to; the whole tokenizer's would cost 100 ms on a large vocabulary.
        decoder = tokenizer.decoder
        self.rules = _rules_of(json.loads(decoder.__getstate__()) if decoder is not None else None)

    def text_of(self, token_id: int) -> str | None:
        """The token's spelling in the vocabulary; None for a special token and for an id without a token."""
        if token_id in self._special:
            return None
        spelling: str | None = self._tokenizer.id_to_token(token_id)
        return spelling

    def hidden_text_of(self, token_id: int) -> str:
        """How a special token is spelt, which a decoded text leaves out; "" for any other."""
        return (self._tokenizer.id_to_token(token_id) or "") if token_id in self._special else ""

    def to_bytes(self, spelling: str) -> bytes:
        """UTF-8 bytes, possibly part of a character."""
        if self.rules.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in spelling])
            except KeyError:  # an added token that is spelt as plain text
                return spelling.encode()
        if self.rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        for old, new in self.rules.replacements:
            spelling = spelling.replace(old, new)
        return spelling.encode()


class StreamDecoder:
    """Turns the tokens of one reply into pieces of text as they arrive.

    The pieces of `push` and the rest from `flush`, joined, are the text that `TextCodec.decode` gives for the same
    tokens. Bytes that are not UTF-8 become U+FFFD once it is certain that no later token completes them. (With
    sentencepiece byte tokens, `decode` writes one U+FFFD per byte of a broken run; here the characters before the
    broken bytes have been given out already and stay.)

    Sentencepiece tokenizers leave out the space before the first token of a text. Where a reply goes on from a prompt
    that was printed, push the prompt's tokens first and drop what they give: then the space is kept.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._to_strip = token_bytes.rules.strip_count

    def push(self, token_id: int) -> str:
        """The text that this token completes: whole characters, or "" if there is none yet.

        Special tokens, and ids that the vocabulary does not hold (padding rows of an embedding), give "".
        """
        spelling = self._token_bytes.text_of(token_id)
        if spelling is None:
            return ""
        rules = self._token_bytes.rules
        if self._first:
            self._first = False
            if rules.drop_in_first_token:
                spelling = spelling.replace(rules.drop_in_first_token, "")
        elif rules.separator:
            spelling = rules.separator + spelling
        return self._strip_start(self._utf8.decode(self._token_bytes.to_bytes(spelling)))

    def hidden_text(self, token_id: int) -> str:
        """What `push` leaves out: the spelling of a special token; "" for any other."""
        return self._token_bytes.hidden_text_of(token_id)

    def flush(self) -> str:
        """What is left at the end of the reply: "" or U+FFFD for a character that was never finished.

        The decoder is then ready for another reply.
        """
        rest = self._strip_start(self._utf8.decode(b"", final=True))
        self._first = True
        self._to_strip = self._token_bytes.rules.strip_count
        return rest

    def _strip_start(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._token_bytes.rules.strip):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text


def _rules_of(decoder: dict[str, Any] | None) -> _Rules:
    """Reads the decoder of a tokenizer.json.

    Raises:
        TextError: a step of it has no meaning token by token.
    """
    rules = _Rules()
    if decoder is None:
        rules.separator = " "  # what the tokenizers library does without a decoder
        return rules
    joined = False  # True once the steps work on the whole text and no longer on each token
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                rules.byte_level = joined = True
            case {"type": "ByteFallback"}:
                rules.byte_fallback = True
            case {"type": "Fuse"}:
                joined = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                rules.replacements += ((old, new),)
            case {"type": "Metaspace", "replacement": str(old), "prepend_scheme": str(scheme)}:
                rules.replacements += ((old, " "),)
                rules.drop_in_first_token = "" if scheme == "never" else old
            case {"type": "Strip", "content": str(character), "start": int(count), "stop": 0} if joined:
                rules.strip, rules.strip_count = character, count
            case _:
                raise TextError(
                    f"The tokenizer's decoder step {step['type']!r} is not supported; supported are byte-level BPE "
                    "and sentencepiece tokenizers, as Llama-family models have them."
                )
    return rules
