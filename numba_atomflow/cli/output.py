"""Writing for people and programs: results to standard output, talk and progress bars to standard error.

Whatever is written may hold text of others: a file's name, a tensor's, a model's reply. None of it commands the user's
terminal: control characters are spelt out, in results and in talk. Only a reply that goes to a file or a pipe, or that
the user wants raw, is written as it is.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from numba_atomflow.errors import DestinationError
from numba_atomflow.files.untrusted import visible
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.progress import Progress

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, GenerationStats


def emit(text: str, *, as_it_is: bool = False) -> None:
    """Write a part of the result now; `as_it_is`, control characters are written and not spelt out.

    Raises:
        DestinationError: standard output is a file on a full disk, or the like.
    """
    if not as_it_is:
        text = visible(text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise DestinationError(f"Standard output could not be written ({error.strerror}); make room for it.") from error


def emit_json(record: dict[str, Any], indent: int | None = 2) -> None:
    """Write a record as the result, null for what is no finite number; without `indent`, on one line."""
    emit(json_text(record, indent) + "\n")


def reply_writer(raw: bool) -> Callable[[str], None]:
    """Writes the pieces of a model's text: as they are to a file, a pipe, or with `raw`; spelt out to a terminal."""
    as_it_is = raw or not sys.stdout.isatty()
    return lambda piece: emit(piece, as_it_is=as_it_is)


def stats_record(engine: "Engine", stats: "GenerationStats") -> dict[str, float]:
    """What a reply cost, for JSON."""
    return {
        "load_seconds": engine.load_seconds,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "tokens": stats.tokens,
        "ttft_seconds": stats.ttft,
        "tpot_seconds": stats.tpot,
        "tokens_per_second": stats.tokens_per_second,
        "weight_bytes_per_token": engine.weight_bytes_per_token,
        "weight_bytes_per_second": engine.weight_bytes_per_token * stats.tokens_per_second,
    }


def say(text: str, end: str = "\n") -> None:
    """Write a line of talk. Where nobody can read it, the work goes on without."""
    try:
        sys.stderr.write(visible(text) + end)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def warn(sentence: str) -> None:
    """Tell a user what was done in another way than they may expect; the command goes on."""
    say(f"warning: {' '.join(sentence.split())}")


def one_line(text: str) -> str:
    """A name for a table or a bar, on one line, whatever it holds."""
    return visible(text).replace("\n", " ")


def discard(stream: TextIO) -> None:
    """Point a stream nowhere: what it still holds would fail again when the interpreter flushes it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def loading_bar() -> AbstractContextManager[Progress | None]:
    """A bar for `Engine.load`, which compiles every kernel at its first start; None if nobody would see it."""
    return steps_bar("kernels (the first start compiles them)")


@contextmanager
def bytes_bar() -> Iterator[Progress | None]:
    """A bar for work that is counted in bytes and may have several phases; None if nobody would see it."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        phase = 0

        def report(what: str, done: int, total: int) -> None:
            nonlocal phase
            if total != phase:  # speed and time left begin anew
                bar.reset(task)
                phase = total
            bar.update(task, description=one_line(what), completed=done, total=total)

        yield report


@contextmanager
def steps_bar(title: str | None = None, time_left: bool = False) -> Iterator[Progress | None]:
    """A bar for work counted in steps, under one title or the name of each step; None if nobody would see it.

    With `time_left` it ends with the time left, instead of the time that has passed.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    clock = TimeRemainingColumn() if time_left else TimeElapsedColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), clock)
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title or "starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=title or one_line(what), completed=done, total=total)

        yield report
