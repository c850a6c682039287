"""Whether two tokenizers have the same tokens."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from numba_atomflow.errors import TextError
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.text.same_tokens import difference_of_tokens


def assets(change: Callable[[dict[str, Any]], object] = lambda record: None) -> TextAssets:
    """The tiny tokenizer with two merges, changed."""
    record = json.loads(tiny_tokenizer().to_str())
    record["model"]["vocab"] |= {"ab": 259, "cd": 260}
    record["model"]["merges"] = [["a", "b"], ["c", "d"]]
    change(record)
    return TextAssets(json.dumps(record).encode())


def swap(record: dict[str, Any]) -> None:
    ids = record["model"]["vocab"]
    ids["x"], ids["y"] = ids["y"], ids["x"]


def add(record: dict[str, Any]) -> None:
    record["added_tokens"].append(record["added_tokens"][0] | {"id": 261, "content": "<|more|>"})


def rename(record: dict[str, Any]) -> None:
    record["added_tokens"].append(record["added_tokens"][0] | {"id": 261, "content": "<|other|>"})


def reorder(record: dict[str, Any]) -> None:
    record["model"]["merges"].reverse()


def as_text(record: dict[str, Any]) -> None:
    record["model"]["merges"] = ["a b", "c d"]


def without_decoder(record: dict[str, Any]) -> None:
    record["decoder"] = None


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (assets(), assets(), ""),
        (assets(), assets(as_text), ""),  # the same merges, as older files write them
        (assets(), assets(without_decoder), ""),  # no matter of tokens
        (TextAssets(), TextAssets(), ""),
        (assets(), TextAssets(), "only one of them has a tokenizer"),
        (TextAssets(), assets(), "only one of them has a tokenizer"),
        (assets(), assets(add), "they have 261 and 262 tokens"),
        (assets(add), assets(), "token 261 is '<|more|>' in one of them only"),
        (assets(add), assets(rename), "token 261 is '<|more|>' in one of them only"),
        (assets(), assets(reorder), "their tokenizers merge differently"),
    ],
)
def test_differences(first: TextAssets, second: TextAssets, difference: str) -> None:
    assert difference_of_tokens(first, second) == difference


def test_the_first_token_that_differs_is_named() -> None:
    assert "in one of them only" in difference_of_tokens(assets(), assets(swap))


def test_a_damaged_tokenizer_is_an_error() -> None:
    with pytest.raises(TextError):
        difference_of_tokens(assets(), TextAssets(b"{}"))
