"""Runs in a process of its own, in which a model's chat template can do no harm: Jinja, and nothing of the engine.

Jinja's sandbox keeps a template away from Python's internals; it bounds neither time nor memory, and a template may
crash Python's compiler. So this process bounds itself: a timer of the kernel ends it when an answer takes too much
computing, and allocations beyond a limit fail. `template_process` starts it, asks it, and says in a sentence how it
ended. It reads standard input (a socket) and answers on it; where the other end is closed, it ends.

Templates are written for `transformers`, so the environment offers what it offers there: trimmed blocks, loop
controls, ``generation`` blocks, ``raise_exception``, ``strftime_now`` and a ``tojson`` that escapes nothing.
"""

import json
import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

SOCKET = 0  # the descriptor of standard input
LENGTH_BYTES = 8  # in front of each message, big-endian
MEMORY = 512 << 20  # bytes of address space, of which Python and Jinja take some 50 MB
MEMORY_PER_BYTE = 24  # more for each byte of a request: its JSON, its strings, the text made of them
REASON = 300  # characters of an error's message that are passed on


def main() -> None:
    """Answer requests until there are no more."""
    _be_a_plain_process()
    while (request := _receive()) is not None:
        answer = _answer(json.loads(request))
        _send(json.dumps(answer).encode())


def _be_a_plain_process() -> None:
    """Undo what a parent may have left: ignored or blocked signals would switch the timer off."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive() -> bytes | None:
    """The next request; None if there are no more."""
    head = _read(LENGTH_BYTES)
    if head is None:
        return None
    size = int.from_bytes(head)
    _limit_memory(MEMORY + MEMORY_PER_BYTE * size)
    return _read(size)


def _read(size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = os.read(SOCKET, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _send(data: bytes) -> None:
    view = memoryview(len(data).to_bytes(LENGTH_BYTES) + data)
    while view:
        view = view[os.write(SOCKET, view) :]


def _limit_memory(size: int) -> None:
    """Let allocations beyond `size` bytes fail; not where the system knows no such limit."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    """What became of a request: ``{"text": ...}``, or "invalid", "refusal", "failure" or "excess" with the reason.

    A request without variables asks only whether the template compiles.
    """
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends the process
    try:
        try:
            template = _compile(request["source"])
        except Exception as error:  # Python refuses some of what Jinja takes: deep nesting, numbers of 5,000 digits
            return {"invalid": _reason(error)}
        if request["variables"] is None:
            return {"text": ""}
        try:
            return {"text": _render(template, request["variables"], request["characters"])}
        except _Refusal as error:
            return {"refusal": _reason(error)}
        except (MemoryError, _TooLongError) as error:
            return {"excess": _reason(error)}
        except Exception as error:  # it may divide by zero, or recurse without end
            return {"failure": _reason(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(maxsize=2)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _render(template: jinja2.Template, variables: Mapping[str, Any], most: int) -> str:
    pieces, characters = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        characters += len(piece)
        if characters > most:
            raise _TooLongError(f"its text is longer than {most:,} characters")
    return "".join(pieces)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"MemoryError: it needs more than {MEMORY >> 20} MB"
    reason = " ".join(str(error)[: 2 * REASON].split())[:REASON]
    return reason or ("it gives no reason" if isinstance(error, _Refusal) else type(error).__name__)


class _Refusal(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class _TooLongError(Exception):
    """The text of a template has no end, or none that is of use."""


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; here it only lets its body through."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PublicNamespace(Namespace):
    """``namespace()`` whose attributes cannot pass for Python's own (``__call__``, ``__html__`` and their kind)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is taken from args, as Jinja does, so that a template may name an attribute `self`.
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not be called {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    # lipsum, Jinja's filler text, is left out: no chat template needs it. Classes are given as functions that make
    # an instance: the class itself would lend its methods.
    environment.globals = {
        "range": environment.globals["range"],  # limited in length by the sandbox
        "dict": _make_dict,
        "namespace": _PublicNamespace,
        "cycler": _make_cycler,
        "joiner": _make_joiner,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _make_cycler(*items: Any) -> Cycler:
    return Cycler(*items)


def _make_joiner(sep: str = ", ") -> Joiner:
    return Joiner(sep)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - the user's own clock, as everywhere


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
