"""Calibration text, tokenized.

The default is the docstrings of Python's standard library, which exist on every machine: technical English with some
code. A text from the model's intended use is better.
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
_MIN_TOKENS = 128  # of a user's text
_MIN_DOCSTRING = 200  # characters; shorter ones are rarely sentences


@dataclass(frozen=True)
class Calibration:
    """Calibration tokens.

    Attributes:
        text: name of the text, for the checkpoint's record.
        tokens: int32 [sequences, T].
    """

    text: str
    tokens: NDArray[np.int32]

    def record(self) -> dict[str, Any]:
        """The JSON-ready record of a checkpoint."""
        digest = hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest()
        return {"text": self.text, "tokens": self.tokens.size, "tokens_sha256": digest}


def read_calibration(path: Path | None, assets: TextAssets, geometry: ModelGeometry) -> Calibration:
    """Up to `SEQUENCES` sequences of a text, evenly spaced; each starts with a BOS if the model uses one.

    Args:
        path: a text file in UTF-8; None: Python's docstrings.
        assets: have the model's tokenizer.
        geometry: of the model; max_positions limits the length of a sequence.

    Raises:
        OptionError: the text is too short.
        TextError: the file cannot be read, or the model has no tokenizer.
    """
    if path is None:
        name, text = "Python's documentation strings", documentation_strings()
    else:
        name, text = path.name, read_text_file(path)
    codec = TextCodec(assets)
    prefix, tokens = codec.encode(""), codec.encode(text, add_special=False)
    if len(tokens) < _MIN_TOKENS:
        raise OptionError(
            f"{name} has {len(tokens)} tokens, too few to calibrate with; give a text of at least {_MIN_TOKENS}."
        )
    largest = max([*prefix, *tokens])
    if largest >= geometry.vocabulary:
        raise TextError(
            f"The tokenizer makes token {largest}, but the model has {geometry.vocabulary}; get the model again."
        )
    length = min(SEQUENCE_TOKENS, geometry.max_positions, len(prefix) + len(tokens)) - len(prefix)
    if length < 1:
        raise OptionError(
            f"The model has {geometry.max_positions} positions, none of them left for a text; "
            "quantize it by the method rtn, which needs no calibration."
        )
    starts = np.linspace(0, len(tokens) - length, min(SEQUENCES, len(tokens) // length)).astype(int)
    rows = [[*prefix, *tokens[start : start + length]] for start in starts]
    return Calibration(name, np.array(rows, np.int32))


def documentation_strings() -> str:
    """The longer docstrings of the standard library's top-level modules, in alphabetical order of modules."""
    docstrings = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # skip this module
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _MIN_DOCSTRING and text.isascii():
                    docstrings.append(text)
    if not docstrings:  # Python without sources
        raise OptionError(
            f"Python {sys.version_info.major}.{sys.version_info.minor} has no documentation strings here; "
            "give a text with --calibration FILE."
        )
    return "\n\n".join(docstrings)
