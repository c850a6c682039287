"""Error handling around the tokenizers library, which is written in Rust, for untrusted tokenizer.json files.

On unexpected contents the library panics: Python gets a `BaseException` that is not an `Exception`, after a report on
file descriptor 2. A normalizer that multiplies the length of a text exhausts the memory, which ends the process;
`check_growth` rejects it beforehand.
"""

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numba_atomflow.errors import AtomFlowError, TextError
from numba_atomflow.files.untrusted import escape_controls

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_GROWTH = 100  # output length of a normalizer or decoder, relative to its input
_MAX_REASON = 200  # characters

_suppress_panic_reports = False


def suppress_panic_reports() -> None:
    """Discard the library's panic reports, for a program that owns standard error and prints the error itself."""
    global _suppress_panic_reports  # noqa: PLW0603 - per process, like the descriptor
    _suppress_panic_reports = True


@contextmanager
def translate_errors(what: str, advice: str, error: Callable[[str], AtomFlowError] = TextError) -> Iterator[None]:
    """Exceptions of the library become one `error`: `what` failed, the library's reason, and the `advice`."""
    try:
        with _without_panic_reports():
            yield
    except (AtomFlowError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as caught:
        reason = escape_controls(" ".join(str(caught).split())) or type(caught).__name__
        if len(reason) > _MAX_REASON:
            reason = reason[: _MAX_REASON - 3] + "..."
        raise error(f"{what} ({reason}); {advice}.") from caught


@contextmanager
def _without_panic_reports() -> Iterator[None]:
    """Buffer standard error, and write it out afterwards unless the block ended in a panic."""
    if not _suppress_panic_reports or not hasattr(os, "memfd_create"):
        yield
        return
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    buffer = os.memfd_create("stderr")
    os.dup2(buffer, 2)
    panicked = False
    try:
        yield
    except BaseException as error:
        panicked = not isinstance(error, Exception)
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        with open(buffer, "rb") as written:  # noqa: PTH123 - a descriptor
            written.seek(0)
            text = b"" if panicked else written.read()
        if text:
            os.write(2, text)


def check_growth(tokenizer: "Tokenizer") -> None:
    """Reject a tokenizer whose normalizer or decoder multiplies the length of a text by more than `MAX_GROWTH`.

    Raises:
        TextError: it does.
    """
    for name in ("normalizer", "decoder"):
        part = getattr(tokenizer, name)
        # The pickle of a part is its JSON; that of the whole tokenizer takes 100 ms with a large vocabulary.
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MAX_GROWTH:
            raise TextError(
                f"The {name} of the model's tokenizer.json makes a text up to {growth:.3g} times as long; "
                "fetch the model again."
            )


def _growth(step: dict[str, Any]) -> float:
    match step:
        case {"type": "Sequence", "normalizers": list(steps)} | {"type": "Sequence", "decoders": list(steps)}:
            growth = 1.0
            for inner in steps:
                growth = min(growth * _growth(inner), 1e300)
            return growth
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return max(1.0, len(new) / max(len(old), 1))
        case {"type": "Replace", "content": str(new)}:  # a regular expression, which may match one character
            return max(1.0, float(len(new)))
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:  # SentencePiece's map of characters
            return max(1.0, float(_longest_replacement(base64.b64decode(encoded))))
        case {"type": "Prepend", "prepend": str(new)}:  # relative to a text of one character
            return 1.0 + len(new)
    return 1.0


def _longest_replacement(characters: bytes) -> int:
    """Characters of the longest text that a map puts in place of a character.

    The map is the length of its index, 4 bytes, the index, and the texts, each with a zero behind it.
    """
    texts = characters[4 + int.from_bytes(characters[:4], "little") :]
    return max(len(text.decode(errors="replace")) for text in texts.split(b"\0"))
