"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face ``tokenizer.json``.

A GGUF file stores the vocabulary, merges or scores, token types and the *name* of the pre-tokenizer. The rest of a
tokenizer.json is added here and in `gguf_pre_tokenizer`, so that the GGUF file and the folder of a model give the same
tokens. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import quote, short
from numba_atomflow.sources import gguf_pre_tokenizer
from numba_atomflow.sources.gguf_fields import GgufFields
from numba_atomflow.sources.gguf_vocabulary import (
    BPE,
    BYTE_LEVEL,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    mark_control_if_bracketed,
    read_vocabulary,
)
from numba_atomflow.sources.pre_tokenizers import GPT2, PreTokenizer
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.text.tokenizers_library import translate_errors

# A file names one EOS token, but a chat model may end a turn with another. As in llama.cpp, tokens of these names end a
# generation, of any type. The tokens of llama.cpp's list that separate the files of a repository (fill in the middle)
# do so only if the file names them.
_EOS_TEXTS = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|EOT|>",
        "<EOT>",
        "_<EOT>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    }
)
_EOS_IF_CONTROL = frozenset({"</s>", "<eos>", "[EOT]", "[EOS]"})  # may also be ordinary text
_NAMED_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_UNDERSCORES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_ONE_SPACE: tuple[dict[str, Any], ...] = (  # instead of several, and none around a text; line breaks are no spaces
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "},
)
# Every split of a token is tested as a merge; SentencePiece's own limit is 16 characters.
_MAX_PIECE = 256


def assets_from_gguf(values: Mapping[str, Any], where: object = "The GGUF file") -> TextAssets:
    """Tokenizer, chat template and EOS tokens of a GGUF file.

    Args:
        values: the file's metadata, key to plain Python value.
        where: the file, for messages.

    Returns:
        The assets, with warnings about ignored settings; without a tokenizer if the file has none.

    Raises:
        SourceError: the tokenizer is not supported, or its metadata are inconsistent.
    """
    fields = GgufFields(values, where)
    kind = fields.value("tokenizer.ggml.model", str)
    chat_template = fields.value("tokenizer.chat_template", str) or None
    if kind in (None, "no_vocab", "none"):
        return TextAssets(chat_template=chat_template)
    if kind not in (BYTE_LEVEL, BPE, UNIGRAM):
        raise SourceError(
            f"{where} has a tokenizer of the model {quote(kind)}, which is not supported; supported are 'gpt2', "
            "'llama' and 't5'."
        )
    vocabulary = read_vocabulary(fields, kind)
    eos_ids = _eos_ids(vocabulary)
    _mark_chat_markers(vocabulary)
    if kind == BYTE_LEVEL:
        pre_tokenizer = _pre_tokenizer(vocabulary)
        body = _byte_level(vocabulary, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    else:
        body = _sentencepiece(vocabulary, kind)
        adds_bos = kind == BPE
    return TextAssets(
        tokenizer_json=_tokenizer_json(body, vocabulary),
        chat_template=chat_template,
        bos_token=vocabulary.special("bos"),
        eos_token=vocabulary.special("eos"),
        unk_token=vocabulary.special("unknown"),
        pad_token=vocabulary.special("padding"),
        eos_ids=eos_ids,
        add_bos=_adds_bos(vocabulary, adds_bos),
        warnings=(*_ignored_settings(fields, kind), *vocabulary.warnings),
    )


def _eos_ids(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Every id that ends a generation, ascending: those that the file names, and those with a known text."""
    ends = {vocabulary.ids[name] for name in _NAMED_ENDS if name in vocabulary.ids}
    for token_id in sorted(ends):
        mark_control_if_bracketed(vocabulary, token_id, "it ends replies, so it is treated as one")
    for token in _EOS_TEXTS & vocabulary.by_text.keys():
        ends.add(vocabulary.by_text[token])
    for token in _EOS_IF_CONTROL & vocabulary.by_text.keys():
        if vocabulary.types[vocabulary.by_text[token]] == CONTROL:
            ends.add(vocabulary.by_text[token])
    if {"<|return|>", "<|call|>"} <= vocabulary.by_text.keys():  # gpt-oss: <|end|> ends a message, not a reply
        ends.discard(vocabulary.by_text.get("<|end|>", -1))
    for token_id in sorted(ends):
        if vocabulary.tokens[token_id] in _EOS_TEXTS:
            vocabulary.make_control(token_id, "tokens of this name end a reply, so it is treated as one")
    return tuple(sorted(ends))


def _mark_chat_markers(vocabulary: Vocabulary) -> None:
    """Make tokens of the form ``<|name|>`` control tokens: no vocabulary learns such tokens from text.

    llama.cpp's converter does the same for added tokens. Other converters may write them as normal tokens; the markers
    of a chat would then be split into characters.
    """
    markers = [
        i
        for token, i in vocabulary.by_text.items()
        if token.startswith("<|") and token.endswith("|>") and vocabulary.types[i] == NORMAL and len(token) > 4
    ]
    for i in markers:
        vocabulary.types[i] = CONTROL
    if markers:
        vocabulary.warn(
            f"does not mark {len(markers)} tokens such as {short(vocabulary.tokens[markers[0]])} as control tokens; "
            "they are treated as such"
        )


def _adds_bos(vocabulary: Vocabulary, default: bool) -> bool:
    stated = vocabulary.fields.value("tokenizer.ggml.add_bos_token", bool)
    add_bos = default if stated is None else stated
    if add_bos and "bos" not in vocabulary.ids:
        vocabulary.warn("asks for a BOS before every text, but does not name it: texts are encoded without one")
    return add_bos and "bos" in vocabulary.ids


def _ignored_settings(fields: GgufFields, kind: str) -> list[str]:
    """Warnings about settings that are ignored for generative models."""
    reasons = {
        "add_eos_token": "a prompt that is to be continued has no EOS at its end",
        "add_sep_token": "separators are for models that compare texts",
    }
    if kind != UNIGRAM:
        reasons["remove_extra_whitespaces"] = "spaces are kept, as llama.cpp does"
    return [
        f"{fields.label} sets tokenizer.ggml.{name}, which is ignored: {reason}."
        for name, reason in reasons.items()
        if fields.value(f"tokenizer.ggml.{name}", bool, False)
    ]


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    """The pre-tokenizer of a byte-level vocabulary: named by the file, or detected from the vocabulary.

    Raises:
        SourceError: the pre-tokenizer is not supported.
    """
    fields = vocabulary.fields
    supported = ", ".join(gguf_pre_tokenizer.NAMED)
    name = fields.value("tokenizer.ggml.pre", str) or "default"
    if name in gguf_pre_tokenizer.NAMED:
        return gguf_pre_tokenizer.NAMED[name]
    if name != "default":
        raise SourceError(
            f"{fields.label} has the pre-tokenizer {quote(name)}, which is not supported; supported are {supported}."
        )
    detected, fits_any = gguf_pre_tokenizer.detect_pre_tokenizer(
        vocabulary.tokens, fields.values.get("general.architecture")
    )
    if detected is not None:
        vocabulary.warn(
            f"does not name its pre-tokenizer; its vocabulary is that of {detected.family}, so text is split as there"
        )
        return detected
    if not fits_any:
        raise SourceError(
            f"{fields.label} does not name its pre-tokenizer, and its vocabulary fits none of those that are "
            f"supported ({supported}); take a newer GGUF file, or a folder with tokenizer.json."
        )
    vocabulary.warn(
        "does not name its pre-tokenizer, and its vocabulary does not determine it: text is "
        "split as in GPT-2, which may give other tokens than the model was trained with"
    )
    return GPT2


def _byte_level(vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> dict[str, Any]:
    """tokenizer.json's entries for byte-level BPE (GPT-2, Llama 3, Qwen2, ...)."""
    merges = [merge.split(" ") for merge in vocabulary.fields.required_items("tokenizer.ggml.merges", str)]
    ids = vocabulary.by_text
    for pair in merges:
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise SourceError(
                f"{vocabulary.fields.label} has the merge {quote(' '.join(pair))}, which is not one of two tokens to "
                "a third; get the file again."
            )
    return {
        "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
        "pre_tokenizer": pre_tokenizer.steps(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges) | {"ignore_merges": pre_tokenizer.whole_words},
    }


def _sentencepiece(vocabulary: Vocabulary, kind: str) -> dict[str, Any]:
    """tokenizer.json's entries for SentencePiece (Llama 2, TinyLlama, Mistral): scores, and ``▁`` for a space.

    A space is inserted before every segment of text between control tokens, even if the segment starts with one, as in
    SentencePiece, llama.cpp and the models' own tokenizer.json. Mistral from its third version on (whose vocabulary has
    [INST] as a control token) inserts one only at the start of the text.
    """
    fields = vocabulary.fields
    scores = fields.required_items("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise SourceError(
            f"{fields.label} has {len(vocabulary.tokens)} tokens but {len(scores)} scores; get the file again."
        )
    if any(map(math.isnan, scores)):
        raise SourceError(f"{fields.label} has a token whose score is not a number; get the file again.")
    prefix_space = fields.value("tokenizer.ggml.add_space_prefix", bool, True)
    instruction = vocabulary.by_text.get("[INST]")
    first_only = instruction is not None and vocabulary.types[instruction] == CONTROL
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    normalizers = _clean_up(fields) if kind == UNIGRAM else []
    if prefix_space and not first_only:
        normalizers.append({"type": "Prepend", "prepend": "▁"})
    if not (prefix_space and first_only):
        normalizers.append(_UNDERSCORES)
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": _in_sequence(normalizers),
        "pre_tokenizer": metaspace if prefix_space and first_only else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": (_unigram if kind == UNIGRAM else _bpe_of_scores)(vocabulary, scores),
    }


def _clean_up(fields: GgufFields) -> list[dict[str, Any]]:
    """What a Unigram model does to a text first: replaces characters (NFKC, say) and removes spaces.

    Raises:
        SourceError: the map of characters is damaged.
    """
    key = "tokenizer.ggml.precompiled_charsmap"
    steps: list[dict[str, Any]] = []
    try:
        characters = bytes(fields.items(key, int) or [])
    except ValueError as error:
        raise fields.unusable(key) from error
    if characters:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(characters).decode()})
    if fields.value("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        steps += _ONE_SPACE
    return steps


def _in_sequence(normalizers: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(normalizers) > 1:
        return {"type": "Sequence", "normalizers": normalizers}
    return normalizers[0] if normalizers else None


def _bpe_of_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> dict[str, Any]:
    return _bpe(vocabulary, _merges_from_scores(vocabulary, scores)) | {
        "unk_token": vocabulary.special("unknown"),
        "fuse_unk": True,
        "byte_fallback": "<0x00>" in vocabulary.by_text,
    }


def _unigram(vocabulary: Vocabulary, scores: Sequence[float]) -> dict[str, Any]:
    """Tokens with their log-probabilities: a text becomes those whose sum is the largest."""
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(vocabulary.tokens)]
    return {
        "type": "Unigram",
        "unk_id": vocabulary.ids.get("unknown"),
        "vocab": [list(pair) for pair in zip(tokens, scores, strict=True)],
        "byte_fallback": "<0x00>" in vocabulary.by_text,
    }


def _merges_from_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> list[list[str]]:
    """Merges, best first: all pairs of tokens whose concatenation is a normal token, by the score of that token.

    SentencePiece merges the adjacent pair with the best score first, which is this order.
    """
    ids = vocabulary.by_text
    ranked = []
    for token, i in ids.items():
        if vocabulary.types[i] != NORMAL:
            continue
        if len(token) > _MAX_PIECE:
            raise SourceError(f"{vocabulary.fields.label} has a token of {len(token)} characters; get the file again.")
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in ids and right in ids:
                ranked.append((-scores[i], i, ids[left], ids[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _bpe(vocabulary: Vocabulary, merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.by_text,
        "merges": merges,
    }


def _tokenizer_json(body: dict[str, Any], vocabulary: Vocabulary) -> bytes:
    """The complete tokenizer.json, validated by loading it.

    Raises:
        SourceError: the tokenizers library rejects it.
    """
    # Gemma's runs of spaces are tokens that are found before anything is merged, once spaces are ▁.
    runs = body["normalizer"] == _UNDERSCORES
    added = [
        {"id": i, "content": token, "special": vocabulary.types[i] != USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        | {"normalized": runs and vocabulary.types[i] == USER_DEFINED and not token.strip(" ▁")}
        for token, i in vocabulary.by_text.items()
        if vocabulary.types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    data = json.dumps(common | body, ensure_ascii=False).encode()
    with translate_errors(f"{vocabulary.fields.label} has a damaged tokenizer", "get the file again", SourceError):
        Tokenizer.from_buffer(data)
    return data
