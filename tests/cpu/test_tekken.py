"""tekken.json gives the tokens of the byte-level tokenizer that it was written from."""

import base64
from pathlib import Path
from typing import Any

import pytest
from text_samples import SAMPLES
from tiny_models import write_json
from toy_tokenizers import byte_level, sentencepiece, sentencepiece_file

from numba_atomflow.errors import SourceError
from numba_atomflow.sources.huggingface_text import folder_text
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.text.detokenizer import byte_alphabet

CONTROL = ("<unk>", "<s>", "</s>", "[INST]")
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tekken(fields: dict[str, Any]) -> dict[str, Any]:
    """The tekken.json of GGUF fields, with as many tokens again that the model does not have."""
    tokens = [bytes(byte_alphabet()[letter] for letter in token) for token in fields["tokenizer.ggml.tokens"][4:]]
    vocabulary = [*tokens, *(b"unused %d" % i for i in range(9))]
    return {
        "config": {"pattern": PATTERN, "default_vocab_size": len(tokens) + 6, "default_num_special_tokens": 6},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(vocabulary)],
        "special_tokens": [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(CONTROL)],
    }


def refused(folder: Path, fragment: str) -> None:
    with pytest.raises(SourceError) as caught:
        folder_text(folder, {}, 2000)
    assert fragment in str(caught.value)
    assert str(folder) in str(caught.value)


def test_tokens_are_those_of_the_original(tmp_path: Path) -> None:
    original, fields = byte_level("tekken", CONTROL, [])
    write_json(tmp_path / "tekken.json", tekken(fields))
    text, files = folder_text(tmp_path, {}, 2000)
    codec = TextCodec(text)
    for sample in SAMPLES:
        if not any(token in sample for token in CONTROL):
            shifted = [token + 2 for token in original.encode(sample).ids]  # two special tokens have only a number
            assert codec.encode(sample, add_special=False) == shifted, sample
    assert codec.encode("[INST]") == [1, 3]
    assert codec.encode("<SPECIAL_5>") == [1, 5]
    assert (text.bos_token, text.eos_token, text.eos_ids, text.add_bos) == ("<s>", "</s>", (2,), True)
    assert (text.warnings, files) == ((), (tmp_path / "tekken.json",))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"config": {"pattern": r"\w+"}}, "splits text by the expression"),
        ({"config": {"pattern": PATTERN}}, "lacks default_num_special_tokens"),
        (
            {"config": {"pattern": PATTERN, "default_vocab_size": 10**6, "default_num_special_tokens": 6}},
            "lists no 999994 tokens",
        ),
        (
            {"config": {"pattern": PATTERN, "default_vocab_size": 10**15 + 500, "default_num_special_tokens": 10**15}},
            "default_num_special_tokens: 1000000000000000",
        ),
        ({"vocab": None}, "tokens; get the file again"),
        ({"vocab": [{"rank": 0, "token_bytes": "!"}] * 900}, "unusable value for vocab"),
        ({"vocab": [{"rank": 0, "token_bytes": "AA=="}] * 900}, "unusable value for vocab"),
        ({"vocab": ["AA=="] * 900}, "unusable value for vocab"),
        ({"special_tokens": None}, "lists no special tokens"),
        ({"special_tokens": [{"rank": 6, "token_str": "<s>"}]}, "unusable value for special_tokens"),
        ({"special_tokens": ["<s>"]}, "unusable value for special_tokens"),
        (
            {"special_tokens": [{"rank": 1, "token_str": "x"}, {"rank": 2, "token_str": "x"}]},
            "two tokens with the text",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Any], fragment: str) -> None:
    write_json(tmp_path / "tekken.json", tekken(byte_level("tekken", CONTROL, [])[1]) | change)
    refused(tmp_path, fragment)


def test_two_tokenizers_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "tekken.json", tekken(byte_level("tekken", CONTROL, [])[1]))
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(sentencepiece()[1]))
    refused(tmp_path, "holds two tokenizers, tokenizer.model and tekken.json")
