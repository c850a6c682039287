"""tekken.json: Mistral's own file of a byte-level tokenizer, as the metadata that a GGUF file has of it.

Source: https://github.com/mistralai/mistral-common (tokens/tokenizers/tekken.py). Tokens are bytes, in the order of
their ranks, and the pair of tokens is merged first whose bytes have the lowest rank. Special tokens have the first ids.
"""

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sources.json_file import integer, mapping, parse_json, unusable
from numba_atomflow.sources.pre_tokenizers import TEKKEN
from numba_atomflow.text.detokenizer import byte_alphabet

_NORMAL, _CONTROL = 1, 3  # types of tokens in a GGUF file
_MAX_BYTES = 256  # of a token: every split of it is tested as a merge
_MAX_SPECIAL = 1 << 20  # Mistral's have 1,000
_NAMED = {"unknown": "<unk>", "bos": "<s>", "eos": "</s>", "padding": "<pad>"}


def tekken_fields(path: Path, data: bytes) -> dict[str, Any]:
    """The GGUF metadata (``tokenizer.ggml.*``) of a tekken.json.

    Args:
        path: for messages.
        data: the file's bytes.

    Raises:
        SourceError: the file is damaged, lists no special tokens, or has another regular expression.
    """
    record = parse_json(path, data)
    config = mapping(path, record, "config")
    if config.get("pattern") != TEKKEN.splits[0]:
        raise SourceError(
            f"{path} splits text by the expression {quote(config.get('pattern'))}, which is not that of Mistral Nemo; "
            "make a tokenizer.json with transformers."
        )
    special_count = integer(path, config, "default_num_special_tokens")
    if not 0 <= special_count <= _MAX_SPECIAL:  # a list of them is made
        raise unusable(path, "default_num_special_tokens", special_count)
    ranks = _ranks(path, record, integer(path, config, "default_vocab_size") - special_count)
    special = _special_tokens(path, record, special_count)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": [*special, *spelled.values()],
        "tokenizer.ggml.token_type": [_CONTROL] * len(special) + [_NORMAL] * len(spelled),
        "tokenizer.ggml.merges": [f"{spelled[left]} {spelled[right]}" for left, right in _merges(ranks)],
    } | {f"tokenizer.ggml.{name}_token_id": special.index(text) for name, text in _NAMED.items() if text in special}


def _ranks(path: Path, record: Mapping[str, Any], count: int) -> dict[bytes, int]:
    """The rank of each token, ascending: of the first `count`, which the model has."""
    entries = record.get("vocab")
    if not isinstance(entries, list) or not 256 <= count <= len(entries):
        raise SourceError(f"{path} lists no {count} tokens; get the file again.")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:count]):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except (TypeError, KeyError, ValueError, binascii.Error):
            raise unusable(path, "vocab", entry) from None
        if entry.get("rank") != rank or not 1 <= len(token) <= _MAX_BYTES or token in ranks:
            raise unusable(path, "vocab", entry)
        ranks[token] = rank
    return ranks


def _special_tokens(path: Path, record: Mapping[str, Any], count: int) -> list[str]:
    """The texts of the special tokens by id; those that the file does not list have a text of their number."""
    entries = record.get("special_tokens")
    if not isinstance(entries, list) or not entries:
        raise SourceError(f"{path} lists no special tokens; get a newer file, or tokenizer.json.")
    texts = [f"<SPECIAL_{i}>" for i in range(count)]
    for entry in entries:
        rank, text = (entry.get("rank"), entry.get("token_str")) if isinstance(entry, dict) else (None, None)
        if type(rank) is not int or not 0 <= rank < count or not isinstance(text, str) or not text:
            raise unusable(path, "special_tokens", entry)
        texts[rank] = text
    return texts


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that are a third token, by the rank of that one."""
    merges = []
    for token in ranks:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += sorted(
            ((left, right) for left, right in pairs if left in ranks and right in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )
    return merges
