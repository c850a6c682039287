"""Calibration text: what the weights must get right.

By default it is Python's own documentation strings, which every machine has: English about technical matters, with some
code in it. A user who knows what the model is for gives a file of that.
"""

import ast
import hashlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OptionError, TextError
from numba_atomflow.files.text_input import read_text_file
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.text.codec import TextAssets, TextCodec

SEQUENCES = 16
SEQUENCE_TOKENS = 512
_FEWEST_TOKENS = 128  # of a user's text
_SHORTEST_DOCSTRING = 200  # characters; shorter ones are rarely sentences


@dataclass(frozen=True)
class Calibration:
    """Tokens that go through the model while it is quantised.

    Attributes:
        text: where they come from, for the checkpoint's record.
        tokens: int32 [sequences, tokens of each].
    """

    text: str
    tokens: NDArray[np.int32]

    def record(self) -> dict[str, Any]:
        """JSON-ready: what a checkpoint says about it."""
        digest = hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()
        return {"text": self.text, "tokens": self.tokens.size, "tokens_sha256": digest}


def read_calibration(path: Path | None, assets: TextAssets, geometry: ModelGeometry) -> Calibration:
    """Up to `SEQUENCES` pieces of a text, evenly spread over it; a model that wants a BOS gets one before each.

    Args:
        path: a text file in UTF-8; None: Python's documentation strings.
        assets: with the model's tokenizer.
        geometry: of the model; its positions limit a sequence.

    Raises:
        OptionError: the text is too short.
        TextError: the file cannot be read, or the model has no tokenizer.
    """
    if path is None:
        name, text = "Python's documentation strings", documentation_strings()
    else:
        name, text = path.name, read_text_file(path)
    codec = TextCodec(assets)
    before, tokens = codec.encode(""), codec.encode(text, add_special=False)
    if len(tokens) < _FEWEST_TOKENS:
        raise OptionError(
            f"{name} has {len(tokens)} tokens, too few to calibrate with; give a text of at least {_FEWEST_TOKENS}."
        )
    largest = max([*before, *tokens])
    if largest >= geometry.vocabulary:
        raise TextError(
            f"The tokenizer makes token {largest}, but the model has {geometry.vocabulary}; get the model again."
        )
    length = min(SEQUENCE_TOKENS, geometry.max_positions, len(before) + len(tokens)) - len(before)
    if length < 1:
        raise OptionError(
            f"The model has {geometry.max_positions} positions, none of them left for a text; "
            "quantise it by the method rtn, which needs no calibration."
        )
    starts = np.linspace(0, len(tokens) - length, min(SEQUENCES, len(tokens) // length)).astype(int)
    rows = [[*before, *tokens[start : start + length]] for start in starts]
    return Calibration(name, np.array(rows, np.int32))


def documentation_strings() -> str:
    """The longer documentation strings of the standard library's top-level modules, in order of their names."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # not this one, then
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST_DOCSTRING and text.isascii():
                    found.append(text)
    if not found:  # a Python without sources
        raise OptionError(
            f"Python {sys.version_info.major}.{sys.version_info.minor} has no documentation strings here; "
            "give a text with --calibration FILE."
        )
    return "\n\n".join(found)
