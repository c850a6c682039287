"""Incremental detokenization: tokens to complete UTF-8 characters.

A token is a sequence of bytes, and a character may span several tokens. Each token is converted to its bytes; an
incremental UTF-8 decoder returns the characters that are complete. The cost per token is constant: earlier tokens
are not decoded again.

The bytes of a token depend on the tokenizer's decoder. Two kinds cover the Llama family: byte-level BPE, whose tokens
are bytes in GPT-2's printable alphabet, and SentencePiece, whose tokens are text with ``▁`` for a space, plus byte
tokens such as ``<0xE4>``.
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
    """GPT-2's alphabet: printable character to byte value, 256 entries.

    Bytes that are printable in Latin-1 map to themselves; the others to U+0100 and up. Source: ``encoder.py`` of
    OpenAI's GPT-2; every byte-level BPE uses it.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = byte_alphabet()


@dataclass
class _Rules:
    """A tokenizer's decoder as rules for one token and for the start of the text."""

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    separator: str = ""  # between tokens
    drop_in_first_token: str = ""  # a character that Metaspace removes from the first token
    strip: str = ""  # a character removed up to `strip_count` times from the start of the text
    strip_count: int = 0


class TokenBytes:
    """The bytes of each token of a tokenizer.

    Raises:
        TextError: the tokenizer's decoder is not supported.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        # The pickle of the decoder is its JSON; that of the whole tokenizer takes 100 ms with a large vocabulary.
        decoder = tokenizer.decoder
        self.rules = _rules_of(json.loads(decoder.__getstate__()) if decoder is not None else None)

    def text_of(self, token_id: int) -> str | None:
        """The vocabulary entry of a token; None for a special token and for an unused id."""
        if token_id in self._special:
            return None
        spelling: str | None = self._tokenizer.id_to_token(token_id)
        return spelling

    def special_text_of(self, token_id: int) -> str:
        """The vocabulary entry of a special token, which decoded text omits; "" for any other token."""
        return (self._tokenizer.id_to_token(token_id) or "") if token_id in self._special else ""

    def to_bytes(self, spelling: str) -> bytes:
        """UTF-8 bytes, possibly part of a character."""
        if self.rules.byte_level:
            try:
                return bytes([_BYTE_OF[character] for character in spelling])
            except KeyError:  # an added token, stored as plain text
                return spelling.encode()
        if self.rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(spelling)):
            return bytes([int(match[1], 16)])
        for old, new in self.rules.replacements:
            spelling = spelling.replace(old, new)
        return spelling.encode()


class Detokenizer:
    """Converts the tokens of one generation to text, token by token.

    The results of `push` and `flush`, joined, are the text that `TextCodec.decode` returns for the same tokens. Bytes
    that are not UTF-8 become U+FFFD as soon as no later token can complete them. (For an invalid run of SentencePiece
    byte tokens, `decode` writes one U+FFFD per byte; here the characters before the run are already returned.)

    SentencePiece tokenizers omit the space before the first token of a text. To continue a printed prompt, push the
    prompt's tokens first and discard the result: the space is then kept.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._to_strip = token_bytes.rules.strip_count

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" if there are none.

        Special tokens and unused ids (padding rows of an embedding) give "".
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

    def special_text(self, token_id: int) -> str:
        """The text of a special token, which `push` omits; "" for any other token."""
        return self._token_bytes.special_text_of(token_id)

    def flush(self) -> str:
        """The rest at the end of a generation: "", or U+FFFD for an incomplete character.

        The detokenizer is then ready for the next generation.
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
    """Rules of the decoder of a tokenizer.json.

    Raises:
        TextError: a step cannot be applied token by token.
    """
    rules = _Rules()
    if decoder is None:
        rules.separator = " "  # the tokenizers library's default
        return rules
    fused = False  # True after a step that joins all tokens into one text
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                rules.byte_level = fused = True
            case {"type": "ByteFallback"}:
                rules.byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                rules.replacements += ((old, new),)
            case {"type": "Metaspace", "replacement": str(old), "prepend_scheme": str(scheme)}:
                rules.replacements += ((old, " "),)
                rules.drop_in_first_token = "" if scheme == "never" else old
            case {"type": "Strip", "content": str(character), "start": int(count), "stop": 0} if fused:
                rules.strip, rules.strip_count = character, count
            case _:
                raise TextError(
                    f"The tokenizer's decoder step {step['type']!r} is not supported; supported are byte-level BPE "
                    "and SentencePiece tokenizers, as in Llama-family models."
                )
    return rules
