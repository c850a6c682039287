"""Tokenizers in GGUF metadata give the same tokens as the original."""

import json
import unicodedata
from typing import Any

import pytest
from text_samples import SAMPLES
from tokenizers import Tokenizer, pre_tokenizers
from toy_tokenizers import (
    CONTROL,
    NFC,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    byte_level,
    sentencepiece,
    unigram,
)

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.detokenizer import byte_alphabet


def codec_of(fields: dict[str, Any]) -> TextCodec:
    return TextCodec(assets_from_gguf(fields))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokens_are_those_of_the_original(pre: str) -> None:
    original, fields = byte_level(pre)
    codec = codec_of(fields)
    for text in SAMPLES:
        assert codec.encode(text) == original.encode(text).ids, text
        normal = unicodedata.normalize("NFC", text) if pre in NFC else text
        assert codec.decode(codec.encode(text), skip_special=False) == normal


def test_sentencepiece_tokens_are_those_of_the_original() -> None:
    original, fields = sentencepiece()
    codec = codec_of(fields)
    for text in SAMPLES:
        ids = codec.encode(text, add_special=False)
        assert ids == original.encode(text).ids, text
        assert codec.decode(ids) == original.decode(ids)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234567", " 8", "  ", " x", "I", "'", "LL"]),
        ("smollm", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'", "LL"]),
        ("llama-bpe", ["123", "456", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("smaug-bpe", ["123", "456", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("dbrx", ["123", "456", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("qwen2", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("deepseek-r1-qwen", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("gpt-4o", ["123", "456", "7", " ", "8", "  ", " x", "I'LL"]),
        ("tekken", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("deepseek-llm", ["1234567", " ", "8", "  ", " x", "I", "'", "LL"]),
        ("deepseek-coder", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'", "LL"]),
        ("deepseek-v3", ["123", "456", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("refact", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'", "LL"]),
        ("starcoder", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'", "LL"]),
        ("olmo", ["1234567", " 8", "  ", " x", "I", "'", "LL"]),
    ],
)
def test_splits_of_each_pre_tokenizer(pre: str, pieces: list[str]) -> None:
    _, fields = byte_level()
    rebuilt = Tokenizer.from_buffer(assets_from_gguf(fields | {"tokenizer.ggml.pre": pre}).tokenizer_json)
    cut = [piece.replace("Ġ", " ") for text in ("1234567 8   x", "I'LL") for piece, _ in pre_pieces(rebuilt, text)]
    assert cut == pieces


def pre_pieces(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    assert tokenizer.pre_tokenizer is not None
    return tokenizer.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.parametrize("stated", [None, "default", ""])
@pytest.mark.parametrize(("pre", "family"), [("gpt-2", "GPT-2"), ("smollm", "SmolLM"), ("qwen2", "Qwen2")])
def test_an_unnamed_pre_tokenizer_is_detected_from_the_vocabulary(pre: str, family: str, stated: str | None) -> None:
    original, fields = byte_level(pre)
    assets = assets_from_gguf(fields | {"tokenizer.ggml.pre": stated}, "some.gguf")
    (warning,) = assets.warnings
    assert warning.startswith("some.gguf does not name its pre-tokenizer")
    assert f"that of {family}," in warning
    codec = TextCodec(assets)
    assert [codec.encode(text) for text in SAMPLES] == [original.encode(text).ids for text in SAMPLES]


def test_deepseek_splits_letters_with_case_from_the_others() -> None:
    _, fields = byte_level()
    rebuilt = Tokenizer.from_buffer(assets_from_gguf(fields | {"tokenizer.ggml.pre": "deepseek-llm"}).tokenizer_json)
    pieces = [piece for piece, _ in pre_pieces(rebuilt, "Ωμ Жар, 你好世界。ab\n12 שלום été")]
    texts = [bytes(byte_alphabet()[letter] for letter in piece).decode() for piece in pieces]
    # its expression for punctuation has the ASCII letters as well
    assert texts == ["Ωμ", " Жар", ",", " ", "你好世界", "。", "ab", "\n", "12", " שלום", " é", "t", "é"]


def test_llama3_is_detected_with_its_bos() -> None:
    original, fields = byte_level("llama-bpe", ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    for key in ("pre", "add_bos_token", "bos_token_id"):
        del fields[f"tokenizer.ggml.{key}"]
    assets = assets_from_gguf(fields)
    assert "Llama 3" in assets.warnings[0]
    assert TextCodec(assets).encode("we'LL see 1234567") == [0, *original.encode("we'LL see 1234567").ids]


def small_vocabulary(*further: str) -> dict[str, Any]:
    """Bytes and a few tokens: too few to detect the pre-tokenizer."""
    _, fields = byte_level()
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *further]
    types = [NORMAL] * len(tokens)
    return fields | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": []}


def test_an_undetected_vocabulary_is_split_as_gpt2_with_a_warning() -> None:
    unnamed = {"tokenizer.ggml.pre": None}
    unknown, known = assets_from_gguf(small_vocabulary() | unnamed), assets_from_gguf(small_vocabulary())
    assert unknown.tokenizer_json == known.tokenizer_json
    assert "may give other tokens" in unknown.warnings[0]
    assert known.warnings == ()


def test_a_vocabulary_that_fits_no_pre_tokenizer_is_refused() -> None:
    sentences = [f"twoĠwords{letter}" for letter in "abcdefg"]
    with pytest.raises(SourceError, match=r"supported \(gpt-2, .*\); take a newer GGUF file"):
        assets_from_gguf(small_vocabulary(*sentences) | {"tokenizer.ggml.pre": None})


def test_a_marker_token_in_another_vocabulary_is_not_sufficient() -> None:
    _, fields = byte_level("gpt-2", ["<|begin_of_text|>", "<|end_of_text|>"])
    assets = assets_from_gguf(fields | {"tokenizer.ggml.pre": None})
    assert "does not determine it" in assets.warnings[0]


def test_llama3_encodes_a_whole_word_without_merges() -> None:
    _, fields = byte_level("llama-bpe")
    tokens = [*fields["tokenizer.ggml.tokens"], "qzxqzx"]
    extended = fields | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], NORMAL],
    }
    assert codec_of(extended).encode("qzxqzx") == [len(tokens) - 1]
    assert len(codec_of(extended | {"tokenizer.ggml.pre": "gpt-2"}).encode("qzxqzx")) > 1


def test_control_tokens_are_hidden_and_user_defined_tokens_shown() -> None:
    _, fields = byte_level()
    codec = codec_of(fields)
    think = len(fields["tokenizer.ggml.tokens"]) - 1
    ids = codec.encode("a<|im_end|>b<think>c")
    assert ids.count(2) == 1
    assert ids.count(think) == 1
    assert codec.decode(ids) == "ab<think>c"
    assert codec.decode(ids, skip_special=False) == "a<|im_end|>b<think>c"


def test_a_unigram_model_of_a_gguf_file_is_that_of_its_folder() -> None:
    """Its name there is t5; texts have no BOS unless the file asks for it."""
    original, fields = unigram()
    assets = assets_from_gguf(fields | {"tokenizer.ggml.model": "t5"})
    codec = TextCodec(assets)
    for sample in SAMPLES:
        assert codec.encode(sample) == original.encode(sample).ids, sample
    assert (assets.bos_token, assets.add_bos, assets.warnings) == ("<s>", False, ())
    for damaged in ([300], [-1]):
        with pytest.raises(SourceError, match="unusable value in the metadata field"):
            assets_from_gguf(fields | {"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": damaged})


def test_sentencepiece_without_prefix_space() -> None:
    _, fields = sentencepiece()
    codec = codec_of(fields | {"tokenizer.ggml.add_space_prefix": False})
    for text in ("word", " word", "  two"):
        assert codec.decode(codec.encode(text)) == text
    assert codec.encode("word") != codec_of(fields).encode("word")


@pytest.mark.parametrize("space", ["▁", " "])  # in a tokenizer.model, and as llama.cpp's converter writes them
def test_runs_of_spaces_are_tokens_of_their_own(space: str) -> None:
    """As in Gemma: the longest run is taken before words are merged."""
    _, fields = sentencepiece()
    count = len(fields["tokenizer.ggml.tokens"])
    more = {"tokens": [space * 2, space * 3], "scores": [0.0, 0.0], "token_type": [USER_DEFINED] * 2}
    extended = {f"tokenizer.ggml.{key}": fields[f"tokenizer.ggml.{key}"] + values for key, values in more.items()}
    codec = codec_of(fields | extended | {"tokenizer.ggml.add_space_prefix": False})
    for text, runs in (("a b", []), ("a  b", [count]), ("a   b", [count + 1]), ("     b", [count + 1, count])):
        ids = codec.encode(text)
        assert [i for i in ids if i >= count] == runs
        assert codec.decode(ids) == text
    assert codec.encode("a ▁▁b") == codec.encode("a   b")


def test_every_token_that_ends_a_reply_is_found() -> None:
    _, fields = byte_level()
    assert assets_from_gguf(fields).eos_ids == (1, 2)  # <|endoftext|> as eos, <|im_end|> by name
    think = len(fields["tokenizer.ggml.tokens"]) - 1
    assert assets_from_gguf(fields | {"tokenizer.ggml.eot_token_id": think}).eos_ids == (1, 2, think)
    assert assets_from_gguf(fields | {"tokenizer.ggml.eom_token_id": 7}).eos_ids == (1, 2, 7)


def retyped(fields: dict[str, Any], token_id: int, kind: int) -> dict[str, Any]:
    types = list(fields["tokenizer.ggml.token_type"])
    types[token_id] = kind
    return fields | {"tokenizer.ggml.token_type": types}


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
@pytest.mark.parametrize(
    "name",
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"],
)
def test_an_eos_token_is_found_by_its_text_for_any_type(name: str, kind: int) -> None:
    _, fields = byte_level("gpt-2", ["<s>", "<|endoftext|>", name])
    assets = assets_from_gguf(retyped(fields, 2, kind), "some.gguf")
    assert assets.eos_ids == (1, 2)
    assert len(assets.warnings) == 1
    assert f"does not mark token 2 ({name}) as a control token" in assets.warnings[0]
    codec = TextCodec(assets)
    assert codec.encode(f"a{name}")[-1] == 2
    assert codec.decode([2]) == ""


def test_an_eos_token_named_by_the_file_ends_a_reply_for_any_type() -> None:
    _, fields = byte_level("gpt-2", ["<s>", "<|endoftext|>", "[STOP]"])
    assets = assets_from_gguf(retyped(fields, 2, NORMAL) | {"tokenizer.ggml.eot_token_id": 2})
    assert assets.eos_ids == (1, 2)
    assert TextCodec(assets).encode("[STOP]") == [2]
    comma = fields["tokenizer.ggml.tokens"].index(",")
    named = TextCodec(assets_from_gguf(fields | {"tokenizer.ggml.eos_token_id": comma}))
    assert named.decode(named.encode("a,b")) == "a,b"  # an id by mistake does not make text disappear


def test_a_normal_token_that_may_be_text_does_not_end_a_reply() -> None:
    _, fields = byte_level("gpt-2", ["<s>", "<|endoftext|>", "</s>"])
    assert assets_from_gguf(fields).eos_ids == (1, 2)
    assert assets_from_gguf(retyped(fields, 2, NORMAL)).eos_ids == (1,)


def test_end_ends_a_message_where_return_and_call_end_a_reply() -> None:
    _, fields = byte_level("gpt-2", ["<s>", "<|endoftext|>", "<|return|>", "<|call|>", "<|end|>"])
    assert assets_from_gguf(fields).eos_ids == (1, 2, 3)


def test_chat_markers_are_not_split_for_any_type() -> None:
    _, fields = byte_level("gpt-2", ["<s>", "<|endoftext|>", "<|im_start|>", "<|user|>"])
    assets = assets_from_gguf(retyped(retyped(fields, 2, NORMAL), 3, NORMAL), "some.gguf")
    (warning,) = assets.warnings
    assert warning.startswith("some.gguf does not mark 2 tokens such as <|im_start|> as control tokens")
    assert TextCodec(assets).encode("<|im_start|><|user|>") == [2, 3]
    _, fields = sentencepiece(["<|im_start|>", "<|user|>"])
    assets = assets_from_gguf(retyped(retyped(fields, 3, NORMAL), 4, NORMAL))
    assert len(assets.warnings) == 1
    assert TextCodec(assets).encode("<|im_start|><|user|>") == [1, 3, 4]


def test_a_sentencepiece_without_token_types_has_its_bytes_and_special_tokens() -> None:
    original, fields = sentencepiece()
    del fields["tokenizer.ggml.token_type"]
    codec = codec_of(fields)
    for text in SAMPLES:
        assert codec.encode(text, add_special=False) == original.encode(text).ids, text


NO_TOKEN = [0xFFFFFFFF, 2**64 - 1, -1, 10**6]


@pytest.mark.parametrize("token_id", NO_TOKEN)
@pytest.mark.parametrize(
    "name",
    ["bos", "eos", "eot", "eom", "padding", "unknown", "seperator", "cls", "mask", "fim_pre", "fim_pad", "prefix"],
)
def test_an_id_outside_the_vocabulary_is_ignored(name: str, token_id: int) -> None:
    _, fields = byte_level()
    key = f"tokenizer.ggml.{name}_token_id"
    assets = assets_from_gguf(fields | {key: token_id}, "some.gguf")
    assert assets.warnings == (
        f"some.gguf has {key} {token_id}, outside its {len(fields['tokenizer.ggml.tokens'])} tokens: ignored.",
    )
    assert all(0 <= end < 1000 for end in assets.eos_ids)
    TextCodec(assets).encode("x")


def test_a_sentencepiece_that_names_no_special_tokens_has_the_usual_ones() -> None:
    _, fields = sentencepiece()
    ids = ("bos_token_id", "eos_token_id", "unknown_token_id")
    nothing = {f"tokenizer.ggml.{name}": value for name, value in zip(ids, (-1, 0xFFFFFFFF, 10**6), strict=True)}
    assets = assets_from_gguf(fields | nothing)
    assert (assets.bos_token, assets.eos_token, assets.unk_token) == ("<s>", "</s>", "<unk>")
    assert (assets.add_bos, assets.eos_ids) == (True, (2,))


def test_a_missing_bos_is_reported() -> None:
    _, fields = byte_level()
    del fields["tokenizer.ggml.bos_token_id"]
    assets = assets_from_gguf(fields | {"tokenizer.ggml.add_bos_token": True})
    assert not assets.add_bos
    assert "asks for a BOS" in assets.warnings[0]


@pytest.mark.parametrize("name", ["add_eos_token", "add_sep_token", "remove_extra_whitespaces"])
def test_ignored_settings_are_reported(name: str) -> None:
    _, fields = sentencepiece()
    key = f"tokenizer.ggml.{name}"
    (warning,) = assets_from_gguf(fields | {key: True}).warnings
    assert key in warning
    assert assets_from_gguf(fields | {key: False}).warnings == ()


def test_duplicate_tokens_are_refused_and_padding_is_not() -> None:
    _, fields = byte_level()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    with pytest.raises(SourceError, match=r"has two tokens with the text .*, 5 and \d+"):
        codec_of(
            fields | {"tokenizer.ggml.tokens": [*tokens, tokens[5]], "tokenizer.ggml.token_type": [*types, NORMAL]}
        )
    count = len(tokens)
    padded = codec_of(
        fields
        | {
            "tokenizer.ggml.tokens": [*tokens, f"[PAD{count}]", "", ""],
            "tokenizer.ggml.token_type": [*types, UNUSED, UNUSED, NORMAL],
        }
    )
    assert padded.vocabulary_size == count
    assert padded.decode([count, count + 1, count + 2]) == ""


def test_a_very_long_token_takes_no_time() -> None:
    _, fields = sentencepiece()
    tokens = [*fields["tokenizer.ggml.tokens"], "a" * 10**6]
    with pytest.raises(SourceError, match="a token of 1000000 characters"):
        codec_of(
            fields
            | {
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], NORMAL],
                "tokenizer.ggml.scores": [*fields["tokenizer.ggml.scores"], 0.0],
            }
        )


@pytest.mark.parametrize(
    ("make", "stated", "added"),
    [
        (byte_level, None, False),
        (byte_level, True, True),
        (lambda: byte_level("llama-bpe"), None, True),
        (lambda: byte_level("llama-bpe"), False, False),
        (sentencepiece, None, True),
        (sentencepiece, False, False),
    ],
)
def test_add_bos_of_the_file_or_the_default(make: Any, stated: bool | None, added: bool) -> None:
    _, fields = make()
    fields.pop("tokenizer.ggml.add_bos_token", None)
    if stated is not None:
        fields["tokenizer.ggml.add_bos_token"] = stated
    codec = codec_of(fields)
    bos = fields["tokenizer.ggml.bos_token_id"]
    assert codec.encode("") == ([bos] if added else [])
    assert codec.encode("x").count(bos) == added
    assert codec.encode("x", add_special=False).count(bos) == 0
    assert codec.encode("<s>x").count(bos) == 1  # in the text: not a second one


def test_named_tokens_and_template_are_in_the_assets() -> None:
    _, fields = sentencepiece()
    assets = assets_from_gguf(
        fields | {"tokenizer.chat_template": "{{ bos_token }}", "tokenizer.ggml.padding_token_id": 2}
    )
    assert assets.special_tokens() == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
    }
    assert assets.chat_template == "{{ bos_token }}"


@pytest.mark.parametrize("fields", [{}, {"tokenizer.ggml.model": "no_vocab"}])
def test_a_file_without_tokenizer_gives_assets_without_one(fields: dict[str, Any]) -> None:
    assert assets_from_gguf(fields).tokenizer_json is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "kimi-k2"}, "'kimi-k2'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [CONTROL]}, "1 token types"),
        ({"tokenizer.ggml.merges": ["nowhere found"]}, "nowhere"),
        ({"tokenizer.ggml.merges": ["nopair"]}, "the merge 'nopair'"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer.ggml.model: ['gpt2']"),
        ({"tokenizer.ggml.pre": ["default"]}, "tokenizer.ggml.pre: ['default']"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens: 1"),
        ({"tokenizer.ggml.token_type": 3}, "tokenizer.ggml.token_type: 3"),
        ({"tokenizer.ggml.token_type": ["3"]}, "tokenizer.ggml.token_type: '3'"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges: 1"),
        ({"tokenizer.ggml.bos_token_id": 1.0}, "tokenizer.ggml.bos_token_id: 1.0"),
        ({"tokenizer.ggml.eos_token_id": "1"}, "tokenizer.ggml.eos_token_id: '1'"),
        ({"tokenizer.ggml.eot_token_id": [1]}, "tokenizer.ggml.eot_token_id: [1]"),
        ({"tokenizer.ggml.eom_token_id": True}, "tokenizer.ggml.eom_token_id: True"),
        ({"tokenizer.ggml.add_bos_token": "no"}, "tokenizer.ggml.add_bos_token: 'no'"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template: 5"),
    ],
)
def test_damaged_metadata_are_refused(change: dict[str, Any], fault: str) -> None:
    _, fields = byte_level()
    with pytest.raises(SourceError) as refusal:
        assets_from_gguf(fields | change)
    assert fault in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tokenizer.ggml.scores": None}, "scores"),
        ({"tokenizer.ggml.scores": [0.0]}, "1 scores"),
        ({"tokenizer.ggml.scores": ["0.0"]}, r"ggml\.scores: '0\.0'"),
        ({"tokenizer.ggml.add_space_prefix": 1}, "add_space_prefix: 1"),
    ],
)
def test_a_damaged_sentencepiece_is_refused(change: dict[str, Any], fault: str) -> None:
    _, fields = sentencepiece()
    with pytest.raises(SourceError, match=fault):
        assets_from_gguf(fields | change)


def test_the_json_is_a_complete_tokenizer_json() -> None:
    """Other programs must be able to read what a checkpoint stores."""
    _, fields = byte_level()
    data = assets_from_gguf(fields).tokenizer_json
    assert data is not None
    record = json.loads(data)
    assert record["model"]["vocab"] == {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
    assert json.loads(Tokenizer.from_buffer(data).to_str())["added_tokens"] == record["added_tokens"]
