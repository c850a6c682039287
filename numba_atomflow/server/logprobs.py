"""Log-probabilities in the shapes of OpenAI's API."""

import codecs
from collections.abc import Sequence
from typing import Any

from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.text.detokenizer import TokenBytes


class TokenNames:
    """The bytes of tokens, and their names: the text, or for a part of a character its bytes, as OpenAI writes them."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens

    def raw(self, token: int) -> bytes:
        """UTF-8, possibly part of a character; a special token is its spelling."""
        spelling = self._tokens.text_of(token)
        return self._tokens.special_text_of(token).encode() if spelling is None else self._tokens.to_bytes(spelling)

    def name(self, token: int) -> str:
        r"""Such as " the", or "bytes:\xe2\x82"."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def is_special(self, token: int) -> bool:
        """Whether the token is no text."""
        return bool(self._tokens.special_text_of(token))


def chat_logprobs(names: TokenNames, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The field `logprobs` of a choice of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(token), "logprob": logprob, "bytes": list(names.raw(token))}

    content = [
        entry(item.token, item.logprob) | {"top_logprobs": [entry(top.token, top.logprob) for top in item.top]}
        for item in found
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The field `logprobs` of a choice of /v1/completions, part by part.

    Args:
        names: of tokens.
        echoed_special: the echoed text spells special tokens, so `text_offset` counts their characters.
    """

    def __init__(self, names: TokenNames, echoed_special: bool) -> None:
        self._names, self._echoed_special = names, echoed_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """Of an echoed prompt, whose first token nothing predicts."""
        return self._part(list(zip(token_ids, found, strict=True)), self._echoed_special)

    def reply(self, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """Of generated tokens."""
        return self._part([(item.token, item) for item in found], shows_special=False)

    def _part(self, tokens: list[tuple[int, TokenLogprobs | None]], shows_special: bool) -> dict[str, Any]:
        offsets = []
        for token, _ in tokens:
            offsets.append(self._offset)
            if shows_special or not self._names.is_special(token):
                self._offset += len(self._decoder.decode(self._names.raw(token)))
        return {
            "tokens": [self._names.name(token) for token, _ in tokens],
            "token_logprobs": [None if item is None else item.logprob for _, item in tokens],
            "top_logprobs": [None if item is None else self._top(item) for _, item in tokens],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens by name, and the token itself."""
        likely = {self._names.name(top.token): top.logprob for top in reversed(item.top)}  # of equal names the likelier
        return likely | {self._names.name(item.token): item.logprob}


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Parts of a completion's logprobs as one."""
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}
