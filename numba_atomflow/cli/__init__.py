"""The command line: ``numba-atomflow generate | chat | convert | quantize | info | perplexity | validate | ...``.

Results go to standard output, messages to standard error. Exit codes: 0 success, 1 a bug in this program (or a
validation that failed), 2 an error that the user can correct (one line ``error: ...``), 130 Ctrl-C, 141 broken pipe
(``| head``).

Heavy modules are imported only where a command needs them: ``--help`` runs without NumPy and numba.
"""

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from numba_atomflow.cli import output
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.text import tokenizers_library

DEBUG = "NUMBA_ATOMFLOW_DEBUG"  # environment variable: show the traceback of an unexpected exception

UNEXPECTED, WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141


def main() -> None:
    """The console script."""
    _open_missing_streams()
    _set_encodings()
    if not _debugging():
        tokenizers_library.suppress_panic_reports()
    sys.exit(run(sys.argv[1:]))


def sandbox_main() -> None:
    """The console script ``numba-atomflow-sandbox``: the sandbox's commands alone."""
    sys.argv.insert(1, "sandbox")
    main()


def run(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    try:
        from numba_atomflow.cli.app import invoke

        return invoke(arguments)
    except AtomFlowError as error:
        return _fail(str(error), WRONG_INPUT)
    except MemoryError as error:
        cause = f" ({error})" if str(error) else ""
        return _fail(f"There is too little free memory for this{cause}; ask for less, or free some.", WRONG_INPUT)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        output.discard(sys.stdout)
        return BROKEN_PIPE
    except Exception as error:
        if _debugging():
            raise
        kind = type(error).__name__
        return _fail(
            f"This is a bug in numba-atomflow ({kind}: {error}); set {DEBUG}=1 for the traceback, and report it.",
            UNEXPECTED,
        )


def _open_missing_streams() -> None:
    """Open the null device for a standard stream that the shell has closed (``>&-``)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


def _set_encodings() -> None:
    """UTF-8 to pipes and files in every locale; a terminal keeps its encoding. PYTHONIOENCODING overrides both.

    Characters that a terminal's encoding lacks, and bytes of file names that are not text, are replaced.
    """
    chosen = bool(os.environ.get("PYTHONIOENCODING"))
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if chosen or stream.isatty() else "utf-8", errors=errors)


def _debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in {"", "0"}


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split("\n"))  # one line, even if a file's name has several
    output.say(f"error: {line}")
    return code
