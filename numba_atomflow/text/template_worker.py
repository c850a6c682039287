"""The process that compiles and renders chat templates: Jinja, and nothing of the engine.

Jinja's sandbox blocks access to Python's internals. It limits neither time nor memory, and a template may crash
Python's compiler. This process limits itself: a CPU timer (SIGPROF) ends it, and allocations beyond RLIMIT_AS fail.
`template_process` starts it, sends requests, and reports how it ended. Requests and answers pass through standard
input, a socket; the process ends when the other end is closed.

Templates are written for `transformers`, so the environment is the same: trimmed blocks, loop controls, ``generation``
blocks, ``raise_exception``, ``strftime_now`` and a ``tojson`` without HTML escapes.
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
LENGTH_BYTES = 8  # length prefix of each message, big-endian
MEMORY_BYTES = 512 << 20  # of address space; Python and Jinja use about 50 MB
MEMORY_PER_BYTE = 24  # added per byte of the request: its JSON, its strings, the rendered text
REASON_CHARACTERS = 300  # of an error message


def main() -> None:
    """Answer requests until the socket is closed."""
    _reset_signals()
    while (request := _receive()) is not None:
        answer = _answer(json.loads(request))
        _send(json.dumps(answer).encode())


def _reset_signals() -> None:
    """Restore SIGPROF, which the parent may have ignored or blocked: the CPU timer needs it. No core dumps."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _receive() -> bytes | None:
    """The next request; None at the end."""
    head = _read(LENGTH_BYTES)
    if head is None:
        return None
    size = int.from_bytes(head)
    _limit_memory(MEMORY_BYTES + MEMORY_PER_BYTE * size)
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
    """Make allocations beyond `size` bytes fail, where the system supports RLIMIT_AS."""
    with suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = size if hard == resource.RLIM_INFINITY else min(size, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(request: Mapping[str, Any]) -> dict[str, str]:
    """The result of a request: ``{"text": ...}``, or "invalid", "refusal", "failure" or "excess" with the reason.

    A request without variables only compiles the template.
    """
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # SIGPROF ends the process
    try:
        try:
            template = _compile(request["source"])
        except Exception as error:  # Python's compiler also rejects: deep nesting, numbers of 5,000 digits
            return {"invalid": _reason(error)}
        if request["variables"] is None:
            return {"text": ""}
        try:
            return {"text": _render(template, request["variables"], request["characters"])}
        except _Refusal as error:
            return {"refusal": _reason(error)}
        except (MemoryError, _TooLongError) as error:
            return {"excess": _reason(error)}
        except Exception as error:  # such as a division by zero or a recursion
            return {"failure": _reason(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@lru_cache(maxsize=2)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _render(template: jinja2.Template, variables: Mapping[str, Any], max_characters: int) -> str:
    pieces, characters = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        characters += len(piece)
        if characters > max_characters:
            raise _TooLongError(f"its text is longer than {max_characters:,} characters")
    return "".join(pieces)


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"MemoryError: it needs more than {MEMORY_BYTES >> 20} MB"
    reason = " ".join(str(error)[: 2 * REASON_CHARACTERS].split())[:REASON_CHARACTERS]
    return reason or ("it gives no reason" if isinstance(error, _Refusal) else type(error).__name__)


class _Refusal(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class _TooLongError(Exception):
    """The output of a template exceeds its length limit."""


class _Generation(Extension):
    """``{% generation %}``: marks the assistant's text for training; here it renders its body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - how Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PublicNamespace(Namespace):
    """``namespace()`` without attributes that Python treats specially, such as ``__call__`` and ``__html__``."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is args[0], as in Jinja, so that a template may set an attribute named `self`.
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
    # Without lipsum, Jinja's filler text: no chat template needs it. Classes are wrapped in functions that return an
    # instance: a class would expose its methods.
    environment.globals = {
        "range": environment.globals["range"],  # its length is limited by the sandbox
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
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - local time, as in transformers


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
