"""Whether two models have the same tokens, so that one of them can continue the other's text by token ids."""

from typing import Any, NamedTuple

from numba_atomflow.errors import TextError
from numba_atomflow.files.untrusted import load_json, quote
from numba_atomflow.text.codec import TextAssets, TextCodec


def difference_of_tokens(first: TextAssets, second: TextAssets) -> str:
    """How the tokens of two models differ, as a clause; "" if they are the same.

    Compared are the ids of all tokens, added and special ones included, and the merges of BPE in their order. Rows of
    the embedding beyond the last token, which models of one family pad differently, are no tokens.

    Raises:
        TextError: a tokenizer.json cannot be used.
    """
    if first.tokenizer_json == second.tokenizer_json:
        return ""
    if first.tokenizer_json is None or second.tokenizer_json is None:
        return "only one of them has a tokenizer"
    tokens, others = _tokens(first, first.tokenizer_json), _tokens(second, second.tokenizer_json)
    for token, number in tokens.ids.items():
        if others.ids.get(token) != number:
            return f"token {number} is {quote(token)} in one of them only"
    if len(others.ids) > len(tokens.ids):
        return f"they have {len(tokens.ids)} and {len(others.ids)} tokens"
    return "" if tokens.merges == others.merges else "their tokenizers merge differently"


class _Tokens(NamedTuple):
    """The ids of tokens, and the merges of BPE: pairs in the order of their rank."""

    ids: dict[str, int]
    merges: list[tuple[str, ...]]


def _tokens(assets: TextAssets, tokenizer_json: bytes) -> _Tokens:
    ids = TextCodec(assets).vocabulary()  # which checks the file as well
    try:
        merges: list[Any] = load_json(tokenizer_json)["model"].get("merges") or []
    except ValueError as error:
        raise TextError(
            f"A model's tokenizer.json cannot be compared, because {error}; fetch the model again."
        ) from error
    return _Tokens(ids, [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges])
