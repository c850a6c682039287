"""The tokens and flags of a model folder that are not in tokenizer.json, written into it.

Up to four files say which strings are tokens. What transformers makes of them (`_from_pretrained` of its tokenizers and
`TokenizersBackend`, version 5.23) is done here to the text of tokenizer.json:

1. ``added_tokens_decoder`` of tokenizer_config.json overrides flags and adds tokens. Without it, the
   standard names of special_tokens_map.json override those of tokenizer_config.json, and added_tokens.json adds tokens;
   with it, both are left unread.
2. Tokens with a name (``eos_token`` and every other key that ends so) and the extra special ones are added, as special
   tokens, if no added token is spelt like them.

Two rules are other ones. A null in one file does not hide a name in the other. And an id that is written down, but is
not the one that the tokenizers library gives the token, is refused: transformers goes on with an id that the model was
not trained with.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from numba_atomflow.errors import SourceError, TextError
from numba_atomflow.files.untrusted import shown
from numba_atomflow.sources.json_file import flag, mapping, unusable
from numba_atomflow.text.codec import TextAssets, TextCodec

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DECODER, _EXTRA, _ADDITIONAL = "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"
_MODEL_SPECIFIC = "model_specific_special_tokens"  # named tokens as transformers 5 saves them
_ID = re.compile(r"[0-9]{1,10}")

Records = Mapping[str, Mapping[str, Any]]  # contents of the folder's JSON files, by file name


@dataclass(frozen=True)
class _Token:
    """A string that is one token wherever a text spells it; flags as in tokenizer.json."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None: only if it is not special
    special: bool = True

    def record(self) -> dict[str, Any]:
        """As tokenizer.json has it, without the id."""
        return asdict(self) | ({"normalized": not self.special} if self.normalized is None else {})


@dataclass(frozen=True)
class FolderTokens:
    """What the files beside tokenizer.json say about tokens.

    Attributes:
        named: spelling by name: ``{"eos_token": "</s>", ...}``.
        listed: tokens with their ids, ascending, and the file that lists them.
        extra: special tokens without name and id.
        overrides: whether flags of `listed` go before those in tokenizer.json.
    """

    named: Mapping[str, _Token]
    listed: tuple[tuple[int, _Token], ...]
    listed_in: Path
    extra: tuple[_Token, ...]
    overrides: bool

    def spellings(self) -> dict[str, str]:
        """The named tokens' texts."""
        return {name: token.content for name, token in self.named.items()}


def folder_tokens(folder: Path, records: Records) -> FolderTokens:
    """Read the files of `folder`.

    Raises:
        SourceError: a value is of a wrong type, or no id.
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
        theirs, more, additional = _special_tokens(folder / SPECIAL_TOKENS, records.get(SPECIAL_TOKENS, {}))
        named = theirs | named | {name: theirs[name] for name in _NAMES if name in theirs}
        extra = list(dict.fromkeys([*extra, *more]))
        special = {named[name].content for name in _NAMES if name in named} | {token.content for token in extra}
        extra = extra or additional
        listed = [
            (_token_id(listed_in, content, value), _Token(content, normalized=not known, special=known))
            for content, value in records.get(ADDED_TOKENS, {}).items()
            for known in [content in special]
        ]
    named = {
        name: named[name] for name in (*_NAMES, *named) if name in named
    }  # the order of their ids, if they are new
    return FolderTokens(named, tuple(sorted(listed, key=lambda item: item[0])), listed_in, tuple(extra), overrides)


class CompleteTokenizer:
    """The tokenizer.json at `path` with all tokens of its folder in it.

    Args:
        path: for messages.
        data: the file's bytes.
        record: what they say.
        tokens: of the folder.

    Attributes:
        data: the bytes of a tokenizer.json; those of the file where it lacks nothing.
        ids: of all tokens, by spelling.
        unlisted: those that no file gives an id; they have the next free ones, which nothing was trained with.

    Raises:
        SourceError: the file is malformed, or an id in another file is not the one that the token has.
    """

    def __init__(self, path: Path, data: bytes, record: Mapping[str, Any], tokens: FolderTokens) -> None:
        self._entries = {token["content"]: dict(token) for token in _added_tokens(path, record)}
        self._vocabulary = _vocabulary(record)
        self.ids = self._vocabulary | {content: token["id"] for content, token in self._entries.items()}
        self._next_id = max([len(self._vocabulary), *(token["id"] + 1 for token in self._entries.values())])
        before = json.dumps(list(self._entries.values()))

        names = {token.content for token in tokens.named.values()}
        for token_id, token in tokens.listed:
            self._put(replace(token, special=token.special or token.content in names), overrides=tokens.overrides)
            if self.ids.get(token.content, token_id) != token_id:  # an empty string is no token
                raise SourceError(
                    f"{tokens.listed_in} gives the token {shown(token.content)} the id {token_id}, but {path} and "
                    f"the tokens before it leave it the id {self.ids[token.content]}; make the two files agree."
                )
        if not tokens.overrides:
            for content in names & self._entries.keys():
                self._entries[content]["special"] = True
        listed = set(self.ids)
        described = set(self._entries)
        for token in dict.fromkeys((*tokens.named.values(), *tokens.extra)):  # of two spelt alike, the later counts
            self._put(token, overrides=token.content not in described)
        self.unlisted = self.ids.keys() - listed

        self.data = data
        if json.dumps(list(self._entries.values())) != before:
            added = list(self._entries.values())
            self.data = json.dumps({**record, "added_tokens": added}, ensure_ascii=False).encode()
        self._check_ids(path)

    def _put(self, token: _Token, *, overrides: bool) -> None:
        """Add a token, or give one that is there other flags, if it `overrides` them."""
        entry = self._entries.get(token.content)
        if entry is not None and overrides:
            # In the library, a token that was special once stays so.
            self._entries[token.content] = entry | token.record() | {"special": token.special or entry.get("special")}
        elif entry is None and token.content:
            token_id = self._vocabulary.get(token.content)
            if token_id is None:
                token_id, self._next_id = self._next_id, self._next_id + 1
            self._entries[token.content] = {"id": token_id} | token.record()
            self.ids[token.content] = token_id

    def _check_ids(self, path: Path) -> None:
        """The tokenizers library, which numbers added tokens by itself, in the order of the file, agrees."""
        try:
            codec = TextCodec(TextAssets(tokenizer_json=self.data))
        except TextError as error:
            raise SourceError(f"{path} cannot be used: {error}") from error
        for content in self._entries:
            if content and codec.token_id(content) != self.ids[content]:  # the library drops an empty one
                raise SourceError(
                    f"{path} gives the token {shown(content)} the id {self.ids[content]}, which the tokenizers "
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
    """The model's own tokens; empty where the library will refuse the file anyway."""
    model = record.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return {token: token_id for token, token_id in vocabulary.items() if type(token_id) is int}
    pieces = vocabulary if isinstance(vocabulary, list) else []  # Unigram: pairs of piece and score
    return {
        piece[0]: i for i, piece in enumerate(pieces) if isinstance(piece, list) and piece and isinstance(piece[0], str)
    }


def _special_tokens(path: Path, record: Mapping[str, Any]) -> tuple[dict[str, _Token], list[_Token], list[_Token]]:
    """Of one file: named tokens, and those without a name under the two keys for them. A null counts as absent."""
    named = {
        key: _token(path, key, value)
        for key, value in record.items()
        if value is not None and (key in _NAMES or (key.endswith("_token") and isinstance(value, str | dict)))
    }
    extra = record.get(_EXTRA) or []
    if isinstance(extra, dict):
        named |= {name: _token(path, name, token) for name, token in extra.items()}
        extra = []
    if named.keys() <= set(_NAMES):  # as in transformers: names elsewhere go instead of these
        named |= {name: _token(path, name, token) for name, token in mapping(path, record, _MODEL_SPECIFIC).items()}
    return named, _tokens(path, _EXTRA, extra), _tokens(path, _ADDITIONAL, record.get(_ADDITIONAL) or [])


def _tokens(path: Path, key: str, values: Any) -> list[_Token]:
    if not isinstance(values, list):
        raise unusable(path, key, values)
    return [_token(path, key, value) for value in values]


def _token(path: Path, key: str, value: Any) -> _Token:
    """A special token: its text, or an object with the text as ``content`` and flags."""
    if isinstance(value, str):
        return _Token(value)
    return _listed_token(path, key, {**value, "special": True} if isinstance(value, dict) else value)


def _listed_token(path: Path, key: str, value: Any) -> _Token:
    """A token as ``added_tokens_decoder`` has it, with the tokenizers library's defaults."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise unusable(path, key, value)
    flags = {name: flag(path, value, name) for name in ("single_word", "lstrip", "rstrip", "special")}
    normalized = None if value.get("normalized") is None else flag(path, value, "normalized")
    return _Token(value["content"], **flags, normalized=normalized)


def _token_id(path: Path, key: str, value: Any) -> int:
    """A token id, which may be written as a string."""
    if isinstance(value, str) and _ID.fullmatch(value):
        return int(value)
    if type(value) is not int or not 0 <= value < 10**10:
        raise unusable(path, key, value)
    return value
