"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face ``tokenizer.json``.

A GGUF stores the vocabulary, merges or scores, token types and the *name* of the pre-tokenizer. What a model's own
tokenizer.json holds beyond that is known here and in `gguf_pre_tokenizer`, so that file and folder of one model give
the same tokens. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from numba_atomflow.errors import SourceError
from numba_atomflow.files.untrusted import short, shown
from numba_atomflow.sources import gguf_pre_tokenizer
from numba_atomflow.sources.gguf_fields import GgufFields
from numba_atomflow.sources.gguf_pre_tokenizer import PreTokenizer
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.text.tokenizers_library import translate_errors

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type

# A file names one end-of-sequence token, but a chat model may end a turn with another. Tokens of these names end a
# reply wherever they come from and whatever type they have, as in llama.cpp; the tokens of its list that separate the
# files of a repository (fill in the middle) end one only if the file names them.
_END_OF_REPLY = frozenset(
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
        "<｜end▁of▁translate_errors｜>",
    }
)
_END_IF_CONTROL = frozenset({"</s>", "<eos>", "[EOT]", "[EOS]"})  # ordinary text may be spelt like these
_NAMED_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_ID_SUFFIX = "_token_id"  # of every key that names a token
_SENTENCEPIECE_IDS = {"unknown": (0, "<unk>"), "bos": (1, "<s>"), "eos": (2, "</s>")}  # where a file names none
# Every cut of a token is tried as a merge; sentencepiece's own limit is 16 characters.
_LONGEST_PIECE = 256


def assets_from_gguf(values: Mapping[str, Any], where: object = "The GGUF file") -> TextAssets:
    """Tokenizer, chat template and end-of-reply tokens of a GGUF file.

    Args:
        values: the file's metadata, key to plain Python value.
        where: the file, for messages.

    Returns:
        The assets, with warnings of what was not followed; without a tokenizer if the file has none.

    Raises:
        SourceError: the tokenizer is of a kind that is not supported, or its description contradicts itself.
    """
    fields = GgufFields(values, where)
    kind = fields.value("tokenizer.ggml.model", str)
    chat_template = fields.value("tokenizer.chat_template", str) or None
    if kind in (None, "no_vocab", "none"):
        return TextAssets(chat_template=chat_template)
    if kind not in ("gpt2", "llama"):
        raise SourceError(
            f"{where} has a tokenizer of the model {shown(kind)}, which is not supported; supported are 'gpt2' and "
            "'llama'."
        )
    vocabulary = _vocabulary(fields, kind)
    eos_ids = _end_of_reply_ids(vocabulary)
    _make_markers_control(vocabulary)
    if kind == "gpt2":
        pre_tokenizer = _pre_tokenizer(vocabulary)
        body = _byte_level(vocabulary, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    else:
        body = _sentencepiece(vocabulary)
        adds_bos = True
    return TextAssets(
        tokenizer_json=_tokenizer_json(body, vocabulary),
        chat_template=chat_template,
        bos_token=vocabulary.named("bos"),
        eos_token=vocabulary.named("eos"),
        unk_token=vocabulary.named("unknown"),
        pad_token=vocabulary.named("padding"),
        eos_ids=eos_ids,
        add_bos=_adds_bos(vocabulary, adds_bos),
        warnings=(*_unfollowed(fields), *vocabulary.warnings),
    )


@dataclass
class _Vocabulary:
    """Tokens by id, and what is known of them.

    Attributes:
        types: token types, those that a token's name overrules corrected.
        ids: of the tokens that the file names, such as "bos"; all of them exist.
        by_spelling: id of every token, padding aside.
        warnings: sentences for the user.
    """

    fields: GgufFields
    tokens: list[str]
    types: list[int]
    ids: dict[str, int] = field(default_factory=dict)
    by_spelling: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def named(self, name: str) -> str | None:
        """Spelling of the token that the file names ``<name>_token_id``; None if it names none."""
        return self.tokens[self.ids[name]] if name in self.ids else None

    def warn(self, what: str) -> None:
        self.warnings.append(f"{self.fields.where} {what}.")

    def make_control(self, token_id: int, why: str) -> None:
        """A token is whole in a text and never shown, whatever its type says."""
        if self.types[token_id] in (_NORMAL, _USER_DEFINED):
            self.types[token_id] = _CONTROL
            self.warn(f"does not mark token {token_id} ({short(self.tokens[token_id])}) as a control token; {why}")


def _vocabulary(fields: GgufFields, kind: str) -> _Vocabulary:
    """The vocabulary with the tokens that the file names.

    Raises:
        SourceError: lists of different lengths, or two tokens that are spelt alike: one of them would have no text.
    """
    tokens = fields.required_items("tokenizer.ggml.tokens", str)
    types = list(fields.items("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise SourceError(f"{fields.where} has {len(tokens)} tokens but {len(types)} token types; get the file again.")
    vocabulary = _Vocabulary(fields, tokens, types)
    for i, token in enumerate(tokens):
        if token == "" or (types[i] == _UNUSED and token == f"[PAD{i}]"):
            continue  # fills up the rows of the embedding, and has no text
        first = vocabulary.by_spelling.setdefault(token, i)
        if first != i:
            raise SourceError(
                f"{fields.where} spells the tokens {first} and {i} alike ({short(token)}), so that text could not be "
                "told apart; take another file."
            )
    _name_tokens(vocabulary, kind)
    return vocabulary


def _name_tokens(vocabulary: _Vocabulary, kind: str) -> None:
    """Fill in `ids`. An id that no token has (-1, for "none", among them) names nothing, whichever key it is in."""
    fields = vocabulary.fields
    prefix = "tokenizer.ggml."
    for key in fields.values:
        if not key.startswith(prefix) or not key.endswith(_ID_SUFFIX):
            continue
        token_id = fields.value(key, int, -1)
        if 0 <= token_id < len(vocabulary.tokens):
            vocabulary.ids[key.removeprefix(prefix).removesuffix(_ID_SUFFIX)] = token_id
        else:
            vocabulary.warn(f"has {short(key)} {token_id}, outside its {len(vocabulary.tokens)} tokens: ignored")
    if kind == "llama":
        for name, (token_id, spelling) in _SENTENCEPIECE_IDS.items():
            if name not in vocabulary.ids and vocabulary.by_spelling.get(spelling) == token_id:
                vocabulary.ids[name] = token_id
        if "unknown" in vocabulary.ids and vocabulary.types[vocabulary.ids["unknown"]] == _NORMAL:
            vocabulary.types[vocabulary.ids["unknown"]] = _UNKNOWN
    elif "bos" not in vocabulary.ids and "<|begin_of_text|>" in vocabulary.by_spelling:
        vocabulary.ids["bos"] = vocabulary.by_spelling["<|begin_of_text|>"]
    if "bos" in vocabulary.ids:
        _make_control_if_spelt_so(vocabulary, vocabulary.ids["bos"], "it begins texts, so it is taken for one")


def _end_of_reply_ids(vocabulary: _Vocabulary) -> tuple[int, ...]:
    """Every id that ends a reply, ascending: those that the file names, and those known by name."""
    ends = {vocabulary.ids[name] for name in _NAMED_ENDS if name in vocabulary.ids}
    for token_id in sorted(ends):
        _make_control_if_spelt_so(vocabulary, token_id, "it ends replies, so it is taken for one")
    for token in _END_OF_REPLY & vocabulary.by_spelling.keys():
        ends.add(vocabulary.by_spelling[token])
    for token in _END_IF_CONTROL & vocabulary.by_spelling.keys():
        if vocabulary.types[vocabulary.by_spelling[token]] == _CONTROL:
            ends.add(vocabulary.by_spelling[token])
    if {"<|return|>", "<|call|>"} <= vocabulary.by_spelling.keys():  # gpt-oss: <|end|> ends a message, not a reply
        ends.discard(vocabulary.by_spelling.get("<|end|>", -1))
    for token_id in sorted(ends):
        if vocabulary.tokens[token_id] in _END_OF_REPLY:
            vocabulary.make_control(token_id, "tokens of this name end a reply, so it is taken for one")
    return tuple(sorted(ends))


def _make_markers_control(vocabulary: _Vocabulary) -> None:
    """Tokens spelt ``<|name|>`` are control tokens: no vocabulary learns such a mixture of letters and signs from text.

    llama.cpp's converter types added tokens of this spelling so as well; files of others may type them as normal, and
    the markers of a chat would be cut into characters.
    """
    markers = [
        i
        for token, i in vocabulary.by_spelling.items()
        if token.startswith("<|") and token.endswith("|>") and vocabulary.types[i] == _NORMAL and len(token) > 4
    ]
    for i in markers:
        vocabulary.types[i] = _CONTROL
    if markers:
        vocabulary.warn(
            f"does not mark {len(markers)} tokens spelt like {short(vocabulary.tokens[markers[0]])} as control tokens; "
            "they are taken for such"
        )


def _make_control_if_spelt_so(vocabulary: _Vocabulary, token_id: int, why: str) -> None:
    """A token that the file names is a control token, unless it is spelt like text: then its id is a mistake."""
    token = vocabulary.tokens[token_id]
    if len(token) > 2 and token[0] + token[-1] in ("<>", "[]"):
        vocabulary.make_control(token_id, why)


def _adds_bos(vocabulary: _Vocabulary, default: bool) -> bool:
    stated = vocabulary.fields.value("tokenizer.ggml.add_bos_token", bool)
    wanted = default if stated is None else stated
    if wanted and "bos" not in vocabulary.ids:
        vocabulary.warn("wants a BOS in front of every text, but does not name it: texts are encoded without one")
    return wanted and "bos" in vocabulary.ids


def _unfollowed(fields: GgufFields) -> list[str]:
    """Warnings about what a tokenizer asks for and nobody does with models that go on with a text."""
    reasons = {
        "add_eos_token": "a prompt that is to be continued has no EOS at its end",
        "add_sep_token": "separators are for models that compare texts",
        "remove_extra_whitespaces": "spaces are kept, as llama.cpp does",
    }
    return [
        f"{fields.where} sets tokenizer.ggml.{name}, which is not followed: {reason}."
        for name, reason in reasons.items()
        if fields.value(f"tokenizer.ggml.{name}", bool, False)
    ]


def _pre_tokenizer(vocabulary: _Vocabulary) -> PreTokenizer:
    """How a byte-level vocabulary cuts text: as the file names it, or as the vocabulary shows.

    Raises:
        SourceError: it is one that is not supported.
    """
    fields = vocabulary.fields
    supported = ", ".join(gguf_pre_tokenizer.NAMED)
    name = fields.value("tokenizer.ggml.pre", str) or "default"
    if name in gguf_pre_tokenizer.NAMED:
        return gguf_pre_tokenizer.NAMED[name]
    if name != "default":
        raise SourceError(
            f"{fields.where} has the pre-tokenizer {shown(name)}, which is not supported; supported are {supported}."
        )
    found, fits_any = gguf_pre_tokenizer.recognised(vocabulary.tokens, fields.values.get("general.architecture"))
    if found is not None:
        vocabulary.warn(
            f"does not name its pre-tokenizer (tokenizer.ggml.pre); its vocabulary is that of {found.family}, so text "
            "is cut as there"
        )
        return found
    if not fits_any:
        raise SourceError(
            f"{fields.where} does not name its pre-tokenizer, and its vocabulary fits none of those that are "
            f"supported; take a newer file, which sets tokenizer.ggml.pre to one of {supported}."
        )
    vocabulary.warn(
        "does not name its pre-tokenizer (tokenizer.ggml.pre), and its vocabulary does not tell which it is: text is "
        "cut as GPT-2 does, which may give other tokens than the model was trained with"
    )
    return gguf_pre_tokenizer.GPT2


def _byte_level(vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer) -> dict[str, Any]:
    """Byte-level BPE (GPT-2, Llama 3, SmolLM, Qwen2): the parts of tokenizer.json that depend on the kind."""
    merges = [merge.split(" ") for merge in vocabulary.fields.required_items("tokenizer.ggml.merges", str)]
    ids = vocabulary.by_spelling
    for pair in merges:
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
            raise SourceError(
                f"{vocabulary.fields.where} has the merge {shown(' '.join(pair))}, which is not one of two tokens to "
                "a third; get the file again."
            )
    return {
        "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
        "pre_tokenizer": pre_tokenizer.steps(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges) | {"ignore_merges": pre_tokenizer.whole_words},
    }


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Sentencepiece BPE (Llama 2, TinyLlama, Mistral): scores in place of merges, ``▁`` in place of spaces.

    A space is put in front of every stretch of text between control tokens, whether it begins with one or not: so
    do sentencepiece, llama.cpp and the models' own tokenizer.json. From its third version on (whose vocabulary has
    [INST] as a control token) Mistral's puts one at the very beginning alone.
    """
    fields = vocabulary.fields
    scores = fields.required_items("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise SourceError(
            f"{fields.where} has {len(vocabulary.tokens)} tokens but {len(scores)} scores; get the file again."
        )
    if any(map(math.isnan, scores)):
        raise SourceError(f"{fields.where} has a token whose score is not a number; get the file again.")
    prefix_space = fields.value("tokenizer.ggml.add_space_prefix", bool, True)
    instruction = vocabulary.by_spelling.get("[INST]")
    first_only = instruction is not None and vocabulary.types[instruction] == _CONTROL
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    underscores = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepended = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, underscores]}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": underscores if not prefix_space else None if first_only else prepended,
        "pre_tokenizer": metaspace if prefix_space and first_only else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(vocabulary, _merges_from_scores(vocabulary, scores))
        | {
            "unk_token": vocabulary.named("unknown"),
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in vocabulary.by_spelling,
        },
    }


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[list[str]]:
    """Pairs to merge, best first: every way to make a normal token from two others, by the token's score.

    Sentencepiece joins the neighbours whose union scores best; as a list of merges that is this order.
    """
    ids = vocabulary.by_spelling
    ranked = []
    for token, i in ids.items():
        if vocabulary.types[i] != _NORMAL:
            continue
        if len(token) > _LONGEST_PIECE:
            raise SourceError(f"{vocabulary.fields.where} has a token of {len(token)} characters; get the file again.")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], i, ids[left], ids[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _bpe(vocabulary: _Vocabulary, merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary.by_spelling,
        "merges": merges,
    }


def _tokenizer_json(body: dict[str, Any], vocabulary: _Vocabulary) -> bytes:
    """The whole tokenizer.json, checked by loading it.

    Raises:
        SourceError: merges that name no token, and whatever else the tokenizers library refuses.
    """
    added = [
        {"id": i, "content": token, "special": vocabulary.types[i] != _USER_DEFINED}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, i in vocabulary.by_spelling.items()
        if vocabulary.types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    common = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "post_processor": None}
    data = json.dumps(common | body, ensure_ascii=False).encode()
    with translate_errors(f"{vocabulary.fields.where} has a damaged tokenizer", "get the file again", SourceError):
        Tokenizer.from_buffer(data)
    return data
