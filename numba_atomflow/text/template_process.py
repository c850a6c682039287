"""The process that renders chat templates, seen from the engine's side: started once, asked many times, ended in time.

One process serves a whole program: `shared` starts it, or gives the one that runs; it lives as long as somebody holds
what `shared` gave. It starts while the caller goes on, so that a command which asks for it before it loads a model
waits for nothing. An answer that does not come in time, a crash or Ctrl-C ends it; the next question starts another.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numba_atomflow.errors import TextError

CPU_SECONDS = 2.0  # of computing for one answer; ordinary templates take milliseconds
WALL_SECONDS = 120.0  # until a process that neither answers nor computes is given up; a busy machine is no fault
CHARACTERS = 1_000_000  # that a template may write, besides
CHARACTERS_PER_CHARACTER = 8  # for each character of the conversation: JSON writes some as six
LARGEST_ANSWER = 1 << 30  # bytes

_START = "import sys; sys.path += sys.argv[1:]; from numba_atomflow.text.template_worker import main; main()"
_LENGTH_BYTES = 8  # as template_worker has it, which is not imported here: it brings Jinja


class TemplateExcessError(TextError):
    """A template goes beyond its limits."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The model's chat template cannot be rendered ({reason}).")


class TemplateProcess:
    """A Python process with nothing but Jinja in it. May be asked by several threads, and after a fork.

    Raises:
        TextError: no process can be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end = self._start()

    def ask(self, source: str, variables: Mapping[str, Any] | None) -> dict[str, str]:
        """Render a template, or with None only compile it.

        Args:
            source: Jinja text.
            variables: what it is rendered with; data as JSON has them.

        Returns:
            ``{"text": ...}``, or one of "invalid", "refusal" and "failure" with the reason.

        Raises:
            TemplateExcessError: the template took too much time or memory, wrote too much, or crashed the process.
            TextError: no process can be started.
        """
        data = json.dumps(variables)
        characters = CHARACTERS + CHARACTERS_PER_CHARACTER * len(data)
        record = {"source": source, "characters": characters, "seconds": CPU_SECONDS}
        request = f'{json.dumps(record)[:-1]}, "variables": {data}}}'.encode()
        with self._lock:
            if not self._end.alive or self._process.poll() is not None:
                self._end()
                self._end = self._start()
            try:
                answer: dict[str, str] = json.loads(self._exchange(request))
            except (EOFError, OSError) as error:
                raise TemplateExcessError(self._how_it_ended(error)) from error
            except BaseException:  # Ctrl-C: an answer that comes too late would be taken for the next one
                self._end()
                raise
        if "excess" in answer:
            raise TemplateExcessError(answer["excess"])
        return answer

    def abandon(self) -> None:
        """After a fork, in the child: leave the process to the parent."""
        self._lock = threading.Lock()
        self._socket.close()
        self._process.returncode = 0  # not this process's child, so nothing to wait for
        self._end.detach()

    def _start(self) -> "weakref.finalize[..., TemplateProcess]":
        """Start a process; what is returned ends it, and does so as well when nobody holds this object any more."""
        own, other = socket.socketpair()
        flags = ["-s", "-S", "-P", "-X", "utf8"] + ["-B"] * sys.dont_write_bytecode
        # Python's own variables could bring code along, or let it wait for a debugger; PYTHONHOME says where it lives.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONHOME"
        }
        try:
            with other:
                self._process = subprocess.Popen(  # noqa: S603 - Python itself
                    [sys.executable, *flags, "-c", _START, *_folders()],
                    stdin=other.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for the program that asks
                )
        except (OSError, ValueError, TypeError) as error:  # TypeError: an embedded Python may not know its program
            own.close()
            raise TextError(
                f"The process that renders the model's chat template cannot be started ({error}); check that "
                f"{sys.executable or 'Python'} can be run and that the machine allows more processes."
            ) from error
        self._socket = own
        return weakref.finalize(self, _stop, own, self._process, os.getpid())

    def _exchange(self, request: bytes) -> bytes:
        """Send a request and receive its answer.

        Raises:
            TimeoutError: it takes too long.
            EOFError, OSError: the process has ended.
        """
        deadline = time.monotonic() + WALL_SECONDS
        self._socket.settimeout(WALL_SECONDS)
        self._socket.sendall(len(request).to_bytes(_LENGTH_BYTES) + request)
        size = int.from_bytes(self._receive(_LENGTH_BYTES, deadline))
        return self._receive(min(size, LARGEST_ANSWER), deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _how_it_ended(self, error: Exception) -> str:
        """Why there was no answer, in words; the process is gone afterwards."""
        if isinstance(error, TimeoutError):
            self._end()
            return f"it takes longer than {WALL_SECONDS:g} seconds"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # it has closed its end, or is about to
        code = self._process.poll()
        self._end()
        if code == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} seconds of computing"
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"it crashes Python: {signal.Signals(-code).name}"
        return "its process ended without an answer, perhaps for lack of memory"


def _stop(connection: socket.socket, process: "subprocess.Popen[bytes]", owner: int) -> None:
    """End a process at once, and leave no zombie. In a forked child only its copy of the connection is closed."""
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _folders() -> list[str]:
    """Where the process finds this package and Jinja with what it needs; Python's own library it knows."""
    packages = [Path(__file__).absolute().parents[2]]
    for name in ("jinja2", "markupsafe"):
        found = find_spec(name)
        if found is None or found.origin is None:
            raise TextError(f"The Python package {name} is missing; install numba-atomflow again.")
        packages.append(Path(found.origin).absolute().parents[1])
    return list(dict.fromkeys(map(str, packages)))


_shared: "weakref.ref[TemplateProcess] | None" = None
_shared_lock = threading.Lock()


def shared() -> TemplateProcess:
    """The program's process, started now unless it runs; it ends when the last holder of this object lets it go.

    Raises:
        TextError: it cannot be started.
    """
    global _shared  # noqa: PLW0603 - one for the whole program is the point
    with _shared_lock:
        process = _shared() if _shared is not None else None
        if process is None:
            process = TemplateProcess()
            _shared = weakref.ref(process)
        return process


@contextmanager
def running() -> Iterator[None]:
    """Hold the program's process, so that it gets ready beside other work.

    Raises:
        TextError: it cannot be started.
    """
    process = shared()
    yield
    del process


def _after_fork_in_child() -> None:
    global _shared_lock  # noqa: PLW0603 - another thread may have held it when this process was forked
    _shared_lock = threading.Lock()
    process = _shared() if _shared is not None else None
    if process is not None:
        process.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
