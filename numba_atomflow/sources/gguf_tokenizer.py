"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face ``tokenizer.json``.

A GGUF stores the vocabulary, merges, token types and the *name* of the pre-tokenizer; the regular expressions behind
those names are known to the reader. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; expressions: the
``tokenizer.json`` of the models that the names come from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from tokenizers import Tokenizer

from numba_atomflow.errors import SourceError
from numba_atomflow.text import TextAssets

_T = TypeVar("_T")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type

# A file names one end-of-sequence token, but a chat model may end a turn with another. Control tokens of these names
# end a reply wherever they come from.
_END_OF_REPLY = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>"}
)


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before merging."""

    split: str | None = None  # regular expression of one piece; None: GPT-2's, which tokenizers has built in
    whole_words: bool = False  # a piece that is in the vocabulary is one token, whatever the merges say
    adds_bos: bool = False  # when the file does not say


_GPT2 = _PreTokenizer()
_LLAMA3 = _PreTokenizer(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    adds_bos=True,
)
_QWEN2 = _PreTokenizer(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    # SmolLM was trained with every digit cut off first, which also keeps spaces before a digit together ("\n\n" in
    # "\n\n2." is one token there and two here). transformers reads these files without that step; its tokens are the
    # reference, so they are reproduced. Digits never merge in this vocabulary: only such spaces differ.
    "smollm": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
}


def assets_from_gguf(fields: Mapping[str, Any]) -> TextAssets:
    """Tokenizer, chat template and end-of-reply tokens of a GGUF file.

    Args:
        fields: the file's metadata, key to plain Python value.

    Returns:
        The assets; without a tokenizer if the file has none.

    Raises:
        SourceError: the tokenizer is of a kind that is not supported, or its description contradicts itself.
    """
    kind = _value(fields, "tokenizer.ggml.model", str)
    chat_template = _value(fields, "tokenizer.chat_template", str) or None
    if kind is None or kind == "no_vocab":
        return TextAssets(chat_template=chat_template)
    tokens = _required(fields, "tokenizer.ggml.tokens", str)
    types = _list(fields, "tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise SourceError(
            f"The GGUF's tokenizer has {len(tokens)} tokens but {len(types)} token types; fetch the file again."
        )
    if kind == "gpt2":
        pre_tokenizer = _pre_tokenizer(fields)
        body = _byte_level(fields, tokens, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    elif kind == "llama":
        body = _sentencepiece(fields, tokens, types)
        adds_bos = True
    else:
        raise SourceError(f"The GGUF's tokenizer model {kind!r} is not supported; supported are 'gpt2' and 'llama'.")
    named = {name: _token(fields, name, tokens) for name in ("bos", "eos", "unknown", "padding")}
    return TextAssets(
        tokenizer_json=_tokenizer_json(body, tokens, types),
        chat_template=chat_template,
        bos_token=named["bos"],
        eos_token=named["eos"],
        unk_token=named["unknown"],
        pad_token=named["padding"],
        eos_ids=_end_of_reply_ids(fields, tokens, types),
        add_bos=_value(fields, "tokenizer.ggml.add_bos_token", bool, adds_bos) and named["bos"] is not None,
    )


def _byte_level(fields: Mapping[str, Any], tokens: list[str], pre_tokenizer: _PreTokenizer) -> dict[str, Any]:
    """Byte-level BPE (GPT-2, Llama 3, SmolLM): the parts of tokenizer.json that depend on the kind."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut: dict[str, Any] = byte_level | {"use_regex": True}
    if pre_tokenizer.split is not None:
        split = {"type": "Split", "pattern": {"Regex": pre_tokenizer.split}, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    merges = [merge.split(" ") for merge in _required(fields, "tokenizer.ggml.merges", str)]
    return {
        "pre_tokenizer": cut,
        "decoder": byte_level | {"use_regex": True},
        "model": _bpe(tokens, merges) | {"ignore_merges": pre_tokenizer.whole_words},
    }


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Sentencepiece BPE (Llama 2, TinyLlama): scores in place of merges, ``▁`` in place of spaces."""
    scores = _required(fields, "tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise SourceError(
            f"The GGUF's tokenizer has {len(tokens)} tokens but {len(scores)} scores; fetch the file again."
        )
    prefix_space = _value(fields, "tokenizer.ggml.add_space_prefix", bool, True)
    scheme = "first" if prefix_space else "never"
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(tokens, _merges_from_scores(tokens, types, scores))
        | {"unk_token": _token(fields, "unknown", tokens), "fuse_unk": True, "byte_fallback": _BYTE in types},
    }


def _merges_from_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Pairs to merge, best first: every way to make a normal token from two others, by the token's score.

    Sentencepiece joins the neighbours whose union scores best; as a list of merges that is this order.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for i, token in enumerate(tokens):
        if types[i] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], i, ids[left], ids[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _bpe(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _tokenizer_json(body: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """The whole tokenizer.json, checked by loading it.

    Raises:
        SourceError: merges that name no token, and whatever else the tokenizers library refuses.
    """
    added = [
        {"id": i, "content": token, "special": types[i] != _USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, token in enumerate(tokens)
        if types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    common = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "post_processor": None,
    }
    data = json.dumps(common | body, ensure_ascii=False).encode()
    try:
        Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise SourceError(f"The GGUF's tokenizer is damaged ({error}); fetch the file again.") from error
    return data


def _pre_tokenizer(fields: Mapping[str, Any]) -> _PreTokenizer:
    name = _value(fields, "tokenizer.ggml.pre", str, "default")
    try:
        return _PRE_TOKENIZERS[name]
    except KeyError:
        raise SourceError(
            f"The GGUF's pre-tokenizer {name!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}."
        ) from None


def _end_of_reply_ids(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[int, ...]:
    """Every id that ends a reply, ascending: those that the file names, and control tokens known by name."""
    named = {_value(fields, f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")}
    known = {i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _END_OF_REPLY}
    return tuple(sorted(known | {i for i in named if i is not None and 0 <= i < len(tokens)}))


def _token(fields: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    """Spelling of the token that the file names ``<name>_token_id``; None if it names none."""
    token_id = _value(fields, f"tokenizer.ggml.{name}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise SourceError(
            f"The GGUF's {name}_token_id is {token_id}, outside its {len(tokens)} tokens; fetch the file again."
        )
    return tokens[token_id]


@overload
def _value(fields: Mapping[str, Any], key: str, kind: type[_T]) -> _T | None: ...


@overload
def _value(fields: Mapping[str, Any], key: str, kind: type[_T], default: _T) -> _T: ...


def _value(fields: Mapping[str, Any], key: str, kind: type[_T], default: _T | None = None) -> _T | None:
    """`fields[key]`, which must be of exactly this type (a bool is no int); `default` if it is not there."""
    value = fields.get(key)
    if value is None:
        return default
    if type(value) is not kind:
        raise _unusable(key, value)
    return value


def _list(fields: Mapping[str, Any], key: str, kind: type[_T]) -> list[_T] | None:
    """`fields[key]`, which must be a list of items of exactly this type; None if it is not there."""
    values = fields.get(key)
    if values is None:
        return None
    if not isinstance(values, list):
        raise _unusable(key, values)
    for value in values:
        if type(value) is not kind:
            raise _unusable(key, value)
    return values


def _required(fields: Mapping[str, Any], key: str, kind: type[_T]) -> list[_T]:
    values = _list(fields, key, kind)
    if values is None:
        raise SourceError(f"The GGUF has no {key!r}, which its tokenizer needs; fetch a complete file.")
    return values


def _unusable(key: str, value: object) -> SourceError:
    return SourceError(f"The GGUF has an unusable value in {key!r}: {repr(value)[:60]}; fetch the file again.")
