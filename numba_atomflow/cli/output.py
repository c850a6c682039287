"""Output: results to standard output, messages and progress bars to standard error.

Output may contain untrusted text: names of files and tensors, a model's reply. Control characters are escaped, so that
no such text controls the user's terminal. Only a reply to a file or a pipe, or with --raw-output, is written unchanged.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from numba_atomflow.errors import DestinationError
from numba_atomflow.files.untrusted import escape_controls
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.progress import Progress

if TYPE_CHECKING:
    from numba_atomflow.engine import Engine, GenerationStats


def emit(text: str, *, raw: bool = False) -> None:
    """Write a part of the result and flush it; with `raw`, control characters are not escaped.

    Raises:
        DestinationError: standard output is a file on a full disk, or the like.
    """
    if not raw:
        text = escape_controls(text)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise DestinationError(f"Standard output could not be written ({error.strerror}); make room for it.") from error


def emit_json(record: dict[str, Any], indent: int | None = 2) -> None:
    """Write a record as JSON, with null for NaN and infinities; without `indent`, on one line."""
    emit(json_text(record, indent) + "\n")


def reply_writer(raw: bool) -> Callable[[str], None]:
    """A function that writes pieces of a reply: escaped to a terminal, unless `raw`; unchanged to a file or a pipe."""
    unescaped = raw or not sys.stdout.isatty()
    return lambda piece: emit(piece, raw=unescaped)


def stats_record(engine: "Engine", stats: "GenerationStats") -> dict[str, float]:
    """Times, tokens and bytes of a reply, for JSON."""
    return {
        "load_seconds": engine.load_seconds,
        "prompt_tokens": stats.prompt_tokens,
        "reused_tokens": stats.reused_tokens,
        "tokens": stats.tokens,
        "ttft_seconds": stats.ttft,
        "tpot_seconds": stats.tpot,
        "tokens_per_second": stats.tokens_per_second,
        "steps": stats.steps,
        "proposed_tokens": stats.proposed,
        "accepted_tokens": stats.accepted,
        "mean_accepted_length": stats.mean_accepted_length,
        "drafting_seconds": stats.drafting_seconds,
        "constraint_seconds": stats.constraint_seconds,
        "weight_bytes_per_token": engine.weight_bytes_per_token,
        "weight_bytes_per_second": engine.weight_bytes_per_token * stats.steps_per_second,
    }


def say(text: str, end: str = "\n") -> None:
    """Write a line to standard error; if that is closed or full, the work continues without."""
    try:
        sys.stderr.write(escape_controls(text) + end)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def warn(sentence: str) -> None:
    """Write a warning; the command continues."""
    say(f"warning: {' '.join(sentence.split())}")


def one_line(text: str) -> str:
    """An untrusted name on one line, for a table or a progress bar."""
    return escape_controls(text).replace("\n", " ")


def discard(stream: TextIO) -> None:
    """Redirect a stream to the null device: the interpreter's flush at exit would fail again on what is buffered."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def size(count: int) -> str:
    """A number of bytes as text: "1.23 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def loading_bar() -> AbstractContextManager[Progress | None]:
    """A progress bar for `Engine.load`, which may compile all kernels; None if standard error is no terminal."""
    return steps_bar("kernels (the first start compiles them)")


@contextmanager
def bytes_bar(after: float = 0.0) -> Iterator[Progress | None]:
    """A progress bar in bytes, over one or more phases; None if standard error is no terminal.

    Args:
        after: seconds until it is shown: for work that is short most of the time.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("reading", total=None)
    phase, shown_from = 0, time.monotonic() + after

    def report(what: str, done: int, total: int) -> None:
        nonlocal phase
        if not bar.live.is_started and time.monotonic() >= shown_from:
            bar.start()
        if total != phase:  # reset speed and time left
            bar.reset(task)
            phase = total
        bar.update(task, description=one_line(what), completed=done, total=total)

    try:
        if not after:
            bar.start()
        yield report
    finally:
        bar.stop()


@contextmanager
def steps_bar(title: str | None = None, time_left: bool = False) -> Iterator[Progress | None]:
    """A progress bar in steps, titled `title` or with the name of each step; None if standard error is no terminal.

    With `time_left` it shows the time left instead of the time passed.
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
