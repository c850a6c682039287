"""Folders without tokenizer.json: tokenizer.model, and vocab.json with merges.txt."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from text_samples import SAMPLES
from tiny_models import write_json
from tokenizers import Tokenizer
from toy_tokenizers import byte_level, character_map, sentencepiece, sentencepiece_file, unigram

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.huggingface_text import folder_text
from numba_atomflow.text.codec import TextAssets, TextCodec

QWEN = {"tokenizer_class": "Qwen2Tokenizer"}


def assets(folder: Path, model_type: str = "llama") -> TextAssets:
    return folder_text(folder, {"model_type": model_type}, 2000)[0]


def refused(folder: Path, fragment: str) -> None:
    with pytest.raises(SourceError) as caught:
        assets(folder)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def write_vocabulary(folder: Path, pre: str, control: Sequence[str] = ("<s>", "<|endoftext|>")) -> Tokenizer:
    """Write vocab.json and merges.txt of a tokenizer."""
    tokenizer, fields = byte_level(pre, control, [])
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *fields["tokenizer.ggml.merges"], ""]))
    return tokenizer


# --- tokenizer.model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("further", [[], ["[INST]", "[/INST]"]])
def test_tokens_of_a_sentencepiece_model_are_those_of_the_original(tmp_path: Path, further: list[str]) -> None:
    original, fields = sentencepiece(further)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields))
    text, files = folder_text(tmp_path, {}, 2000)
    codec = TextCodec(text)
    for sample in SAMPLES:
        assert codec.encode(sample, add_special=False) == original.encode(sample).ids, sample
    assert codec.encode("a")[0] == 1
    assert (text.bos_token, text.eos_token, text.unk_token, text.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert (text.eos_ids, text.add_bos, text.warnings) == ((2,), True, ())
    assert files == (tmp_path / "tokenizer.model",)


def test_the_other_files_of_the_folder_count(tmp_path: Path) -> None:
    original, fields = sentencepiece()
    count = len(fields["tokenizer.ggml.tokens"])
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields))
    added = {str(count): {"content": "<|im_end|>", "special": True}}
    settings = {"add_bos_token": False, "eos_token": "<|im_end|>", "added_tokens_decoder": added}
    write_json(tmp_path / "tokenizer_config.json", settings)
    codec = TextCodec(assets(tmp_path))
    assert codec.encode("a<|im_end|>") == [*original.encode("a").ids, count]
    assert codec.eos_ids == {count}
    write_json(tmp_path / "tokenizer_config.json", {"add_prefix_space": False})
    codec = TextCodec(assets(tmp_path))
    assert codec.decode(codec.encode(" a")) == " a"


def test_a_model_without_prefix(tmp_path: Path) -> None:
    _, fields = sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields, normalizer={3: 0}))
    codec = TextCodec(assets(tmp_path))
    for text in ("a", " a", "  a b"):
        assert codec.decode(codec.encode(text)) == text


def most_likely(text: str, scores: dict[str, float]) -> list[str]:
    """The pieces of a text with the largest sum of scores, by dynamic programming (Kudo, 2018)."""
    best: list[tuple[float, list[str]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        pieces = ((best[start], text[start:end]) for start in range(max(0, end - 20), end) if text[start:end] in scores)
        best.append(max((before[0] + scores[piece], [*before[1], piece]) for before, piece in pieces))
    return best[-1][1]


def test_tokens_of_a_unigram_model_are_those_of_the_original(tmp_path: Path) -> None:
    original, fields = unigram()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields, {3: 1}, {4: 0}))
    text = assets(tmp_path)
    codec = TextCodec(text)
    for sample in SAMPLES:
        assert codec.encode(sample, add_special=False) == original.encode(sample).ids, sample
    assert (text.bos_token, text.eos_ids, text.add_bos, text.warnings) == ("<s>", (2,), True, ())
    learned = slice(259, None)  # after special tokens and bytes
    tokens, scores = (fields[f"tokenizer.ggml.{key}"][learned] for key in ("tokens", "scores"))
    words = "the other sentence is not there"
    expected = most_likely("▁" + words.replace(" ", "▁"), dict(zip(tokens, scores, strict=True)))
    assert [fields["tokenizer.ggml.tokens"][i] for i in codec.encode(words, add_special=False)] == expected
    assert codec.decode(codec.encode("  twice  ")) == "  twice  "
    assert codec.decode(codec.encode("\u732b")) == "\u732b"  # by bytes


def test_a_unigram_model_that_removes_spaces(tmp_path: Path) -> None:
    """Its default: none around a text, one between words; line breaks are kept."""
    _, fields = unigram()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields, {3: 1}))
    codec = TextCodec(assets(tmp_path))
    assert codec.decode(codec.encode("  a   b\n  c\n ")) == "a b\n c\n"
    assert codec.encode("  a   b ") == codec.encode("a b")
    assert codec.encode("   ", add_special=False) == []


def test_a_unigram_model_that_replaces_characters(tmp_path: Path) -> None:
    _, fields = unigram()
    characters = character_map({"\ufb01": "fi", "\u2460": "1", "\u3000": " ", "\n": " "})
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields, {3: 1}, {1: "nmt_nfkc", 2: characters}))
    codec = TextCodec(assets(tmp_path))
    assert codec.encode("\ufb01nd\u3000\n no \u2460\u2461") == codec.encode("find no 1\u2461")
    assert codec.decode(codec.encode("\ufb01nd\u3000\n no \u2460\u2461")) == "find no 1\u2461"


@pytest.mark.parametrize(
    ("trainer", "normalizer", "fragment"),
    [
        ({3: 4}, {}, "of the kind characters, where only BPE and Unigram are supported"),
        ({3: 77}, {}, "of the kind 77, where only BPE and Unigram are supported"),
        ({24: 1}, {}, "puts spaces at the ends of words"),
        ({}, {1: "nmt_nfkc", 2: b"map"}, "replaces characters ('nmt_nfkc')"),
        ({3: 1}, {1: "nmt_nfkc", 2: b"map"}, "has a damaged tokenizer"),
        ({3: b"x"}, {}, "damaged (setting 3 has another type)"),
        ({41: 1.0}, {}, "damaged (setting 41 has another type)"),
    ],
)
def test_another_kind_of_model_is_refused(
    tmp_path: Path, trainer: dict[int, Any], normalizer: dict[int, Any], fragment: str
) -> None:
    _, fields = sentencepiece()
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(fields, trainer, normalizer))
    refused(tmp_path, fragment)


def test_a_truncated_model_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = sentencepiece_file(sentencepiece()[1])
    for length in (*range(40), *range(40, len(data), len(data) // 12), *range(len(data) - 40, len(data))):
        (tmp_path / "tokenizer.model").write_bytes(data[:length])
        refused(tmp_path, "not a SentencePiece model, or damaged")


def test_damaged_bytes_give_one_sentence_or_a_tokenizer(tmp_path: Path) -> None:
    data = sentencepiece_file(sentencepiece()[1])
    rng = random.Random(8)
    refusals = 0
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 20)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        try:
            assets(tmp_path)
        except SourceError as error:
            refusals += 1
            assert str(tmp_path / "tokenizer.model") in str(error)  # noqa: PT017 - not every damage is one
    assert refusals > 10


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"IQ== 0\nIg== 1\n", "is a vocabulary of tiktoken"),
        (b"", "it ends before its settings"),
        (b"\x0b", "no wire type 3"),
        (b"\x80" * 12, "has no end"),
        (b"\x0a\xff\x7f", "16383 bytes are announced"),
        (b"\x08\x01", "field 1 is a number"),
        (b'{"a": 1}', "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: bytes, fragment: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    refused(tmp_path, fragment)


# --- vocab.json and merges.txt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "config", "warnings"),
    [("gpt-2", {}, ["GPT-2"]), ("smollm", {"tokenizer_class": "GPT2Tokenizer"}, ["SmolLM"]), ("qwen2", QWEN, [])],
)
def test_tokens_of_vocabulary_and_merges_are_those_of_the_original(
    tmp_path: Path, pre: str, config: dict[str, Any], warnings: list[str]
) -> None:
    original = write_vocabulary(tmp_path, pre)
    write_json(tmp_path / "tokenizer_config.json", config | {"bos_token": "<s>", "eos_token": "<|endoftext|>"})
    text, files = folder_text(tmp_path, {}, 2000)
    codec = TextCodec(text)
    for sample in SAMPLES:
        assert codec.encode(sample) == original.encode(sample).ids, sample
    assert len(text.warnings) == len(warnings)
    assert all(f"that of {family}," in warning for family, warning in zip(warnings, text.warnings, strict=True))
    assert (text.eos_ids, text.add_bos) == ((1,), False)
    assert files == tuple(tmp_path / name for name in ("tokenizer_config.json", "vocab.json", "merges.txt"))


def test_the_model_type_says_that_it_is_qwen(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, "qwen2")
    (warning,) = assets(tmp_path, "qwen3").warnings
    assert "that of Qwen2" in warning


@pytest.mark.parametrize(
    ("vocabulary", "merges", "fragment"),
    [
        ({"a": 0, "b": 1}, "a b\n", "has the merge a b, which is not one of two tokens of vocab.json"),
        ({"a": 0, "b": 1, "ab": 2}, "a\n", "has the merge a,"),
        ({"a": 0, "b": 0}, "", "gives 'a' and 'b' the same id 0"),
        ({"a": -1}, "", "gives the token 'a' the id -1"),
        ({"a": 10**9}, "", "gives the token 'a' the id 1000000000"),
        ({"a": "0"}, "", "gives the token 'a' the id '0'"),
        ({"a": True}, "", "gives the token 'a' the id True"),
        (["a"], "", "holds a JSON list"),
        ({}, "", "lists no tokens"),
        ({"a": 0}, None, "holds vocab.json without merges.txt"),
        (None, "a b\n", "holds merges.txt without vocab.json"),
        ({"a": 0}, b"\xff\xfe", "merges.txt is not UTF-8 (byte 0)"),
    ],
)
def test_damaged_vocabularies_are_refused(
    tmp_path: Path, vocabulary: Any, merges: str | bytes | None, fragment: str
) -> None:
    if vocabulary is not None:
        write_json(tmp_path / "vocab.json", vocabulary)
    if merges is not None:
        (tmp_path / "merges.txt").write_bytes(merges.encode() if isinstance(merges, str) else merges)
    refused(tmp_path, fragment)


# --- several tokenizers ----------------------------------------------------------------------------------------------


def test_two_tokenizers_are_refused(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, "gpt-2")
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(sentencepiece()[1]))
    refused(tmp_path, "holds two tokenizers, tokenizer.model and vocab.json, and no tokenizer.json")


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    original, _ = sentencepiece()
    (tmp_path / "tokenizer.json").write_text(original.to_str())
    (tmp_path / "tokenizer.model").write_bytes(b"anything")
    write_json(tmp_path / "vocab.json", {})
    text, files = folder_text(tmp_path, {}, 2000)
    assert json.loads(text.tokenizer_json or b"") == json.loads(original.to_str())
    assert files == (tmp_path / "tokenizer.json",)
