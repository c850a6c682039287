"""A tokenizer goes into GGUF metadata and comes out again with the same tokens."""

import json
from typing import Any

import pytest
from text_samples import SAMPLES
from tokenizers import Tokenizer
from toy_tokenizers import CONTROL, NORMAL, PRE_TOKENIZERS, byte_level, sentencepiece

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.text import TextCodec


def codec_of(fields: dict[str, Any]) -> TextCodec:
    return TextCodec(assets_from_gguf(fields))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokens_are_those_of_the_original(pre: str) -> None:
    original, fields = byte_level(pre)
    codec = codec_of(fields)
    for text in SAMPLES:
        assert codec.encode(text) == original.encode(text).ids, text
        assert codec.decode(codec.encode(text), skip_special=False) == text


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
        ("smollm", ["1234567", " 8", "  ", " x", "I", "'", "LL"]),
        ("default", ["1234567", " 8", "  ", " x", "I", "'", "LL"]),
        ("llama-bpe", ["123", "456", "7", " ", "8", "  ", " x", "I", "'LL"]),
        ("qwen2", ["1", "2", "3", "4", "5", "6", "7", " ", "8", "  ", " x", "I", "'LL"]),
    ],
)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre: str, pieces: list[str]) -> None:
    _, fields = byte_level()
    rebuilt = Tokenizer.from_buffer(assets_from_gguf(fields | {"tokenizer.ggml.pre": pre}).tokenizer_json)
    cut = [piece.replace("Ġ", " ") for text in ("1234567 8   x", "I'LL") for piece, _ in pre_pieces(rebuilt, text)]
    assert cut == pieces


def pre_pieces(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    assert tokenizer.pre_tokenizer is not None
    return tokenizer.pre_tokenizer.pre_tokenize_str(text)


def test_a_file_that_names_no_pre_tokenizer_gets_the_default_one() -> None:
    _, fields = byte_level()
    unnamed = {key: value for key, value in fields.items() if key != "tokenizer.ggml.pre"}
    assert assets_from_gguf(unnamed) == assets_from_gguf(fields | {"tokenizer.ggml.pre": "default"})


def test_llama3_takes_a_whole_word_that_its_merges_do_not_reach() -> None:
    _, fields = byte_level("llama-bpe")
    tokens = [*fields["tokenizer.ggml.tokens"], "qzxqzx"]
    extended = fields | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*fields["tokenizer.ggml.token_type"], NORMAL],
    }
    assert codec_of(extended).encode("qzxqzx") == [len(tokens) - 1]
    assert len(codec_of(extended | {"tokenizer.ggml.pre": "gpt-2"}).encode("qzxqzx")) > 1


def test_control_tokens_are_whole_and_hidden_and_user_defined_ones_whole_and_shown() -> None:
    _, fields = byte_level()
    codec = codec_of(fields)
    think = len(fields["tokenizer.ggml.tokens"]) - 1
    ids = codec.encode("a<|im_end|>b<think>c")
    assert ids.count(2) == 1
    assert ids.count(think) == 1
    assert codec.decode(ids) == "ab<think>c"
    assert codec.decode(ids, skip_special=False) == "a<|im_end|>b<think>c"


def test_sentencepiece_without_prefix_space() -> None:
    _, fields = sentencepiece()
    codec = codec_of(fields | {"tokenizer.ggml.add_space_prefix": False})
    for text in ("word", " word", "  two"):
        assert codec.decode(codec.encode(text)) == text
    assert codec.encode("word") != codec_of(fields).encode("word")


def test_every_token_that_ends_a_reply_is_found() -> None:
    _, fields = byte_level()
    assert assets_from_gguf(fields).eos_ids == (1, 2)  # <|endoftext|> as eos, <|im_end|> by name
    think = len(fields["tokenizer.ggml.tokens"]) - 1
    assert assets_from_gguf(fields | {"tokenizer.ggml.eot_token_id": think}).eos_ids == (1, 2, think)
    assert assets_from_gguf(fields | {"tokenizer.ggml.eom_token_id": 7}).eos_ids == (1, 2, 7)


def test_a_normal_token_spelt_like_an_end_does_not_end_a_reply() -> None:
    _, fields = byte_level()
    types = list(fields["tokenizer.ggml.token_type"])
    types[2] = NORMAL
    assert assets_from_gguf(fields | {"tokenizer.ggml.token_type": types}).eos_ids == (1,)


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
def test_bos_is_added_as_the_file_says_and_else_as_its_kind_does(make: Any, stated: bool | None, added: bool) -> None:
    _, fields = make()
    fields.pop("tokenizer.ggml.add_bos_token", None)
    if stated is not None:
        fields["tokenizer.ggml.add_bos_token"] = stated
    codec = codec_of(fields)
    bos = fields["tokenizer.ggml.bos_token_id"]
    assert codec.encode("") == ([bos] if added else [])
    assert codec.encode("x").count(bos) == added
    assert codec.encode("x", add_special=False).count(bos) == 0
    assert codec.encode("<s>x").count(bos) == 1  # spelt out in the text: not a second one


def test_named_tokens_and_template_are_handed_over() -> None:
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
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.pre": "deepseek-v3"}, "'deepseek-v3'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [CONTROL]}, "1 token types"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"tokenizer.ggml.merges": ["nowhere found"]}, "nowhere"),
        ({"tokenizer.ggml.merges": ["nopair"]}, "damaged"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "'tokenizer.ggml.model': ['gpt2']"),
        ({"tokenizer.ggml.pre": ["default"]}, "'tokenizer.ggml.pre': ['default']"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "'tokenizer.ggml.tokens': 1"),
        ({"tokenizer.ggml.token_type": 3}, "'tokenizer.ggml.token_type': 3"),
        ({"tokenizer.ggml.token_type": ["3"]}, "'tokenizer.ggml.token_type': '3'"),
        ({"tokenizer.ggml.merges": [1, 2]}, "'tokenizer.ggml.merges': 1"),
        ({"tokenizer.ggml.bos_token_id": 1.0}, "'tokenizer.ggml.bos_token_id': 1.0"),
        ({"tokenizer.ggml.eos_token_id": "1"}, "'tokenizer.ggml.eos_token_id': '1'"),
        ({"tokenizer.ggml.eot_token_id": [1]}, "'tokenizer.ggml.eot_token_id': [1]"),
        ({"tokenizer.ggml.eom_token_id": True}, "'tokenizer.ggml.eom_token_id': True"),
        ({"tokenizer.ggml.add_bos_token": "no"}, "'tokenizer.ggml.add_bos_token': 'no'"),
        ({"tokenizer.chat_template": 5}, "'tokenizer.chat_template': 5"),
    ],
)
def test_a_damaged_description_is_refused_in_one_sentence(change: dict[str, Any], fault: str) -> None:
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
        ({"tokenizer.ggml.scores": ["0.0"]}, r"ggml\.scores': '0\.0'"),
        ({"tokenizer.ggml.add_space_prefix": 1}, "add_space_prefix': 1"),
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
