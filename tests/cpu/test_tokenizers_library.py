"""Untrusted tokenizers: panics, exceptions and growth in the tokenizers library become errors."""

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import tiny_tokenizer
from toy_tokenizers import character_map

from numba_atomflow.errors import SourceError, TextError
from numba_atomflow.text import tokenizers_library
from numba_atomflow.text.codec import TextAssets, TextCodec
from numba_atomflow.text.tokenizers_library import translate_errors

LONG_MAP = base64.b64encode(character_map({"a": "b" * 101})).decode()
ASSETS = TextAssets(tokenizer_json=tiny_tokenizer().to_str().encode())


def changed(change: Callable[[dict[str, Any]], Any]) -> TextAssets:
    assert ASSETS.tokenizer_json is not None
    record = json.loads(ASSETS.tokenizer_json)
    change(record)
    return replace(ASSETS, tokenizer_json=json.dumps(record).encode())


def replacing(*steps: tuple[str, str]) -> dict[str, Any]:
    normalizers = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in steps]
    return {"type": "Sequence", "normalizers": normalizers}


def split_at(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "nowhere", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["model"].update(continuing_subword_prefix="\x1b]0;pwn", merges=[["a", "b"]]),  # a panic
        lambda r: r.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),  # a panic
        lambda r: r.update(pre_tokenizer=split_at("(")),
        lambda r: r["model"].update(dropout=2.0),
        lambda r: r.update(model=5),
        lambda r: r.clear(),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(
        TextError, match=r"^The model's tokenizer\.json cannot be read \(.+\); fetch the model again\.$"
    ) as e:
        TextCodec(changed(change))
    assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(pre_tokenizer={"type": "FixedLength", "length": 0}),  # a panic
        lambda r: r.update(pre_tokenizer=split_at("(a+)+$")),  # backtracking beyond the library's own limit: a panic
        lambda r: r.update(normalizer=replacing(("", "b"))),
        lambda r: r["model"].update(type="WordLevel", unk_token="[UNK]"),
    ],
)
def test_a_tokenizer_that_cannot_encode(change: Callable[[dict[str, Any]], Any]) -> None:
    codec = TextCodec(changed(change))
    with pytest.raises(
        TextError, match=r"^The model's tokenizer cannot encode the text \(.+\); fetch the model again\.$"
    ):
        codec.encode("a" * 40 + "!")


def test_a_template_that_names_an_unknown_token() -> None:
    with pytest.raises(TextError, match="tokenizer"):
        TextCodec(changed(lambda r: r.update(post_processor=TEMPLATE))).encode("a")


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": replacing(*[("a", "a" * 1000)] * 4)},
        {"normalizer": replacing(("a", "a" * 60), ("aa", "a" * 60))},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_MAP}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "b" * 101}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "ab"}] * 5}},
        {"decoder": {"type": "Sequence", "decoders": replacing(*[("a", "a" * 1000)] * 40)["normalizers"]}},
    ],
)
def test_a_normalizer_or_decoder_that_multiplies_the_text(part: dict[str, Any]) -> None:
    with pytest.raises(TextError, match="times as long"):
        TextCodec(changed(lambda r: r.update(part)))


def test_replacements_of_real_models_are_accepted() -> None:
    steps = [(" ", "▁"), ("``", '"'), ("''", '"'), ("\n", "▁▁")]
    assert TextCodec(changed(lambda r: r.update(normalizer=replacing(*steps)))).encode("a b")


def test_settings_of_a_training_run_are_ignored() -> None:
    def set_up(r: dict[str, Any]) -> None:
        r["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        r["padding"] = {
            "strategy": {"Fixed": 10**9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
        r["model"]["dropout"] = 0.9
        r["model"]["vocab"]["ab"] = 259
        r["model"]["merges"] = [["a", "b"]]

    codec = TextCodec(changed(set_up))
    assert {tuple(codec.encode("ab" * 20)) for _ in range(20)} == {(259,) * 20}


@pytest.mark.parametrize("ids", [[-1], [1 << 40]])
def test_invalid_ids(ids: list[int]) -> None:
    with pytest.raises(TextError, match="cannot decode the tokens"):
        TextCodec(ASSETS).decode(ids)


def test_a_lone_surrogate_as_bos() -> None:
    with pytest.raises(TextError, match="its tokenizer lacks"):
        TextCodec(replace(ASSETS, add_bos=True, bos_token="\ud800"))
    assert TextCodec(ASSETS).token_id("\ud800") is None


def test_ctrl_c_is_not_translated() -> None:
    for passing in (KeyboardInterrupt, SystemExit, SourceError):
        with pytest.raises(passing), translate_errors("x", "y"):
            raise passing


def fail_after(words: bytes) -> None:
    os.write(2, words)
    raise ValueError


def test_only_panic_reports_are_discarded(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_library, "_suppress_panic_reports", True)
    codec = TextCodec(changed(lambda r: r.update(pre_tokenizer={"type": "FixedLength", "length": 0})))
    with pytest.raises(TextError, match="chunk size must be non-zero"):
        codec.encode("a")
    with translate_errors("x", "y"):
        os.write(2, b"kept\n")
    with pytest.raises(TextError), translate_errors("x", "y"):
        fail_after(b"kept as well\n")
    print("afterwards", file=sys.stderr)
    assert capfd.readouterr().err == "kept\nkept as well\nafterwards\n"
