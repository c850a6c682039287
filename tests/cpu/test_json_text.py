"""JSON for other programs: no NaN, no infinities, no lone surrogates."""

import json
import math

import numpy as np

from numba_atomflow.utils.json_text import json_text


def test_nan_and_infinity_become_null() -> None:
    record = {"a": [1.5, math.inf, -math.inf, (math.nan, 2)], "b": {"c": np.float64("nan")}, "d": "NaN", "e": None}
    assert json.loads(json_text(record)) == {
        "a": [1.5, None, None, [None, 2]],
        "b": {"c": None},
        "d": "NaN",
        "e": None,
    }
    assert json_text({"a": math.inf}, indent=2) == '{\n  "a": null\n}'


def test_texts_are_valid_unicode() -> None:
    name = "Grüße".encode().decode("ascii", "surrogateescape")  # as Python reads it in a C locale
    record = {"name": name, name: ["\udcff", "a\ud800", "\ud83d\ude42"], "text": "🙂"}
    expected = {"name": "Grüße", "Grüße": ["\ufffd", "a\ufffd", "🙂"], "text": "🙂"}
    assert json.loads(json_text(record)) == expected
