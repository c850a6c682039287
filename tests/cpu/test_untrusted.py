"""Untrusted values in messages, and untrusted JSON."""

import numpy as np
import pytest

from numba_atomflow.files.untrusted import load_json, quote, short


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("it's", '"it\'s"'),
        (None, "None"),
        ([1, 2], "[1, 2]"),
        ((320, 192), "(320, 192)"),
        (2**63, "9223372036854775808"),
        pytest.param(10**5000, "<16610 bits>", id="an integer that Python refuses to print"),
        ("\x1b[2J", r"'\x1b[2J'"),
        pytest.param(np.zeros((2, 1)), "array([[0.], [0.]])", id="a repr of two lines"),
    ],
)
def test_a_value_is_quoted(value: object, expected: str) -> None:
    assert quote(value) == expected


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [0] * 10**6, {str(i): i for i in range(10**5)}, 10**900, [[[["deep"]]]] * 50, object()],
    ids=["text", "list", "dict", "integer", "nested", "object"],
)
def test_a_value_takes_less_than_a_line(value: object) -> None:
    assert len(quote(value)) <= 80


def test_a_name_is_one_printable_line() -> None:
    assert short("layer.0.qkv.weight") == "layer.0.qkv.weight"
    assert short("a\x1b[2J\nb") == r"a\x1b[2J\nb"
    assert len(short("x" * 10**6)) == 80
    assert len(short("\0" * 10**6)) == 80


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5, "nested too deeply"),
        ("9" * 1001, "a number of 1001 digits"),
        ("-" + "9" * 10**6, "a number of 1000000 digits"),
        (b'{"a": "\xff"}', "byte 7 is not utf-8"),
        ("{'a': 1}", "line 1 column 2"),
        ("", "line 1 column 1"),
    ],
    ids=["lists", "objects", "digits", "negative", "encoding", "syntax", "empty"],
)
def test_invalid_json(text: str | bytes, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as refused:
        load_json(text)
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize("times", [2, 60_000])
def test_duplicate_names(times: int) -> None:
    text = '{"c": 1' + ', "a": 1, "b": 1' * times + "}"
    assert load_json(text)["a"] == 1
    with pytest.raises(ValueError, match="a is listed twice"):
        load_json(text, unique=True)


def test_valid_json_is_parsed_as_by_the_standard_library() -> None:
    text = '{"a": [1, -2.5, 1e400, null, true, "\\ud83d\\ude00"], "limit": 1000000000000000019884624838656}'
    assert load_json(text, unique=True) == {"a": [1, -2.5, float("inf"), None, True, "😀"], "limit": int(1e30)}
