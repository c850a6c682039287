"""The tokenizers library, asked for things about files of others: whatever it raises becomes a sentence.

It is written in Rust. Where it does not expect what a tokenizer.json holds it panics, which reaches Python as a
`BaseException` that is no `Exception`, after a report on the file descriptor of standard error. A normaliser that
multiplies a text asks for more memory than there is, and that ends the process; so it is refused before.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numba_atomflow.errors import AtomFlowError, TextError
from numba_atomflow.files.untrusted import visible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_GROWTH = 100  # times as long as it was may a normaliser, or a decoder, make a text
_LONGEST_REASON = 200  # characters

_keep_panics_quiet = False


def keep_panics_quiet() -> None:
    """Drop the library's reports of panics, for a program that owns standard error and writes a sentence instead."""
    global _keep_panics_quiet  # noqa: PLW0603 - a property of the process, as the descriptor is
    _keep_panics_quiet = True


@contextmanager
def sentence(what: str, advice: str, error: Callable[[str], AtomFlowError] = TextError) -> Iterator[None]:
    """Whatever goes wrong inside becomes one error: `what` went wrong, the library's reason, and the `advice`."""
    try:
        with _quiet_panics():
            yield
    except (AtomFlowError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as caught:
        reason = visible(" ".join(str(caught).split())) or type(caught).__name__
        if len(reason) > _LONGEST_REASON:
            reason = reason[: _LONGEST_REASON - 3] + "..."
        raise error(f"{what} ({reason}); {advice}.") from caught


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """What is written to standard error inside comes out afterwards, unless a panic ends it."""
    if not _keep_panics_quiet or not hasattr(os, "memfd_create"):
        yield
        return
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    caught = os.memfd_create("stderr")
    os.dup2(caught, 2)
    panicked = False
    try:
        yield
    except BaseException as error:
        panicked = not isinstance(error, Exception)
        raise
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        with open(caught, "rb") as written:  # noqa: PTH123 - a descriptor
            written.seek(0)
            text = b"" if panicked else written.read()
        if text:
            os.write(2, text)


def check_growth(tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer whose steps, one after another, make a text longer without measure.

    Raises:
        TextError: they do.
    """
    for name in ("normalizer", "decoder"):
        part = getattr(tokenizer, name)
        # A part's JSON is what it pickles to; the whole tokenizer's would cost 100 ms on a large vocabulary.
        growth = 1.0 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MOST_GROWTH:
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
        case {"type": "Replace", "content": str(new)}:  # of an expression, which may match one character
            return max(1.0, float(len(new)))
        case {"type": "Prepend", "prepend": str(new)}:  # to a text of one character
            return 1.0 + len(new)
    return 1.0
