"""Merges the tokens and flags of a folder's other files into tokenizer.json.

Up to four files define tokens. The rules are those of transformers 5.23 (`_from_pretrained` of its tokenizers and
`TokenizersBackend`), applied to tokenizer.json:

1. ``added_tokens_decoder`` of tokenizer_config.json overrides flags and adds tokens; special_tokens_map.json and
   added_tokens.json are then not read. Without it, the standard names of special_tokens_map.json override those of
   tokenizer_config.json, and added_tokens.json adds tokens.
2. Named tokens (``eos_token`` and every other key that ends in ``_token``) and extra special tokens are added as
   special tokens, unless an added token has the same text.

Two rules differ. A null in one file does not hide a name in the other. A stored id that is not the id of the token in
the tokenizers library is an error: transformers continues with an id that the model was not trained with.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError, TextError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sources.json_file import flag, mapping, unusable
from numba_atomflow.text.codec import TextAssets, TextCodec

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DECODER, _EXTRA, _ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
_MODEL_SPECIFIC = "model_specific_special_tokens"  # named tokens in the format of transformers 5
_ID = re.compile(r"[0-9]{1,10}")

Records = Mapping[str, Mapping[str, Any]]  # contents of the folder's JSON files, by file name


@dataclass(frozen=True)
class _Token:
    """An added token, with its flags in tokenizer.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None: True unless special
    special: bool = True

    def record(self) -> dict[str, Any]:
        """The entry of tokenizer.json, without the id."""
        return asdict(self) | ({"normalized": not self.special} if self.normalized is None else {})


@dataclass(frozen=True)
class FolderTokens:
    """The tokens in the files other than tokenizer.json.

    Attributes:
        named: token by name: ``{"eos_token": ...}``.
        listed: tokens with their ids, ascending.
        listed_in: the file of `listed`.
        extra: special tokens without name and id.
        overrides: whether the flags of `listed` override those in tokenizer.json.
    """

    named: Mapping[str, _Token]
    listed: tuple[tuple[int, _Token], ...]
    listed_in: Path
    extra: tuple[_Token, ...]
    overrides: bool

    def texts(self) -> dict[str, str]:
        """The text of each named token."""
        return {name: token.content for name, token in self.named.items()}


def folder_tokens(folder: Path, records: Records) -> FolderTokens:
    """The tokens of the folder's files.

    Raises:
        SourceError: a value has a wrong type, or an id is invalid.
    """
    path, config = folder / TOKENIZER_CONFIG, records.get(TOKENIZER_CONFIG, {})
    named, extra, additional = _special_tokens(path, config)
    extra = extra or additional
    overrides = config.get(_DECODER) is not None
    if overrides:
        listed_in = path
        listed = [
            (_token_id(path, _DECODER, key), _listed_token(path, f"{_DECODER}[{key}]", value))
            for key, value in mapping(path, config, _DECODER).items()
        ]
    else:
        listed_in = folder / ADDED_TOKENS
        mapped, more, additional = _special_tokens(folder / SPECIAL_TOKENS, records.get(SPECIAL_TOKENS, {}))
        named = mapped | named | {name: mapped[name] for name in _NAMES if name in mapped}
        extra = list(dict.fromkeys([*extra, *more]))
        special = {named[name].content for name in _NAMES if name in named} | {token.content for token in extra}
        extra = extra or additional
        listed = [
            (_token_id(listed_in, content, value), _Token(content, normalized=not is_special, special=is_special))
            for content, value in records.get(ADDED_TOKENS, {}).items()
            for is_special in [content in special]
        ]
    # New tokens get their ids in this order.
    named = {name: named[name] for name in (*_NAMES, *named) if name in named}
    return FolderTokens(named, tuple(sorted(listed, key=lambda item: item[0])), listed_in, tuple(extra), overrides)


class CompleteTokenizer:
    """The tokenizer.json at `path`, completed with all tokens of its folder.

    Args:
        path: for messages.
        data: the file's bytes.
        record: the parsed file.
        tokens: of the folder.

    Attributes:
        data: the bytes of the completed tokenizer.json; unchanged if it was complete.
        ids: of all tokens, by text.
        unlisted: tokens without an id in any file; they have the next free ids, which the model was not trained with.

    Raises:
        SourceError: the file is malformed, or an id in another file is not that of the token.
    """

    def __init__(self, path: Path, data: bytes, record: Mapping[str, Any], tokens: FolderTokens) -> None:
        self._entries = {token["content"]: dict(token) for token in _added_tokens(path, record)}
        self._vocabulary = _vocabulary(record)
        self.ids = self._vocabulary | {content: token["id"] for content, token in self._entries.items()}
        self._next_id = max([len(self._vocabulary), *(token["id"] + 1 for token in self._entries.values())])
        initial = json.dumps(list(self._entries.values()))

        names = {token.content for token in tokens.named.values()}
        for token_id, token in tokens.listed:
            self._add(replace(token, special=token.special or token.content in names), overrides=tokens.overrides)
            if self.ids.get(token.content, token_id) != token_id:  # an empty string is not a token
                raise SourceError(
                    f"{tokens.listed_in} gives the token {quote(token.content)} the id {token_id}, but {path} and "
                    f"the tokens before it give it the id {self.ids[token.content]}; make the two files agree."
                )
        if not tokens.overrides:
            for content in names & self._entries.keys():
                self._entries[content]["special"] = True
        listed = set(self.ids)
        existing = set(self._entries)
        for token in dict.fromkeys((*tokens.named.values(), *tokens.extra)):  # the last of equal texts counts
            self._add(token, overrides=token.content not in existing)
        self.unlisted = self.ids.keys() - listed

        self.data = data
        if json.dumps(list(self._entries.values())) != initial:
            added = list(self._entries.values())
            self.data = json.dumps({**record, "added_tokens": added}, ensure_ascii=False).encode()
        self._check_ids(path)

    def _add(self, token: _Token, *, overrides: bool) -> None:
        """Add a token, or change the flags of an existing one if it `overrides` them."""
        entry = self._entries.get(token.content)
        if entry is not None and overrides:
            # In the tokenizers library, a special token stays special.
            self._entries[token.content] = entry | token.record() | {"special": token.special or entry.get("special")}
        elif entry is None and token.content:
            token_id = self._vocabulary.get(token.content)
            if token_id is None:
                token_id, self._next_id = self._next_id, self._next_id + 1
            self._entries[token.content] = {"id": token_id} | token.record()
            self.ids[token.content] = token_id

    def _check_ids(self, path: Path) -> None:
        """Check that the tokenizers library, which numbers added tokens in file order, assigns the same ids."""
        try:
            codec = TextCodec(TextAssets(tokenizer_json=self.data))
        except TextError as error:
            raise SourceError(f"{path} cannot be used: {error}") from error
        for content in self._entries:
            if content and codec.token_id(content) != self.ids[content]:  # the library drops an empty token
                raise SourceError(
                    f"{path} gives the token {quote(content)} the id {self.ids[content]}, which the tokenizers "
                    "library does not; get the file again."
                )


def _added_tokens(path: Path, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    added = record.get("added_tokens") or []
    if not isinstance(added, list):
        raise unusable(path, "added_tokens", added)
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise unusable(path, "added_tokens", token)
    return added


def _vocabulary(record: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of the model; empty if it is malformed, which the library rejects later."""
    model = record.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return {token: token_id for token, token_id in vocabulary.items() if type(token_id) is int}
    pieces = vocabulary if isinstance(vocabulary, list) else []  # Unigram: pairs of text and score
    return {
        piece[0]: i for i, piece in enumerate(pieces) if isinstance(piece, list) and piece and isinstance(piece[0], str)
    }


def _special_tokens(path: Path, record: Mapping[str, Any]) -> tuple[dict[str, _Token], list[_Token], list[_Token]]:
    """The special tokens of one file: named ones, and unnamed ones of each of the two keys. Null counts as absent."""
    named = {
        key: _token(path, key, value)
        for key, value in record.items()
        if value is not None and (key in _NAMES or (key.endswith("_token") and isinstance(value, str | dict)))
    }
    extra = record.get(_EXTRA) or []
    if isinstance(extra, dict):
        named |= {name: _token(path, name, token) for name, token in extra.items()}
        extra = []
    if named.keys() <= set(_NAMES):  # as in transformers: ignored if other names exist
        named |= {name: _token(path, name, token) for name, token in mapping(path, record, _MODEL_SPECIFIC).items()}
    return named, _tokens(path, _EXTRA, extra), _tokens(path, _ADDITIONAL, record.get(_ADDITIONAL) or [])


def _tokens(path: Path, key: str, values: Any) -> list[_Token]:
    if not isinstance(values, list):
        raise unusable(path, key, values)
    return [_token(path, key, value) for value in values]


def _token(path: Path, key: str, value: Any) -> _Token:
    """A special token from its text, or from an object with ``content`` and flags."""
    if isinstance(value, str):
        return _Token(value)
    return _listed_token(path, key, {**value, "special": True} if isinstance(value, dict) else value)


def _listed_token(path: Path, key: str, value: Any) -> _Token:
    """A token of ``added_tokens_decoder``, with the tokenizers library's defaults."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise unusable(path, key, value)
    flags = {name: flag(path, value, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    normalized = None if value.get("normalized") is None else flag(path, value, "normalized")
    return _Token(value["content"], **flags, normalized=normalized)


def _token_id(path: Path, key: str, value: Any) -> int:
    """A token id, which may be a string."""
    if isinstance(value, str) and _ID.fullmatch(value):
        return int(value)
    if type(value) is not int or not 0 <= value < 10**10:
        raise unusable(path, key, value)
    return value
