"""The client of the process that renders chat templates (`template_worker`).

One process serves the whole program: `shared_process` starts it or returns the running one; it ends with the last
reference to that object. It starts asynchronously, so a command that starts it before loading a model does not wait.
A timeout, a crash or Ctrl-C ends the process; the next request starts another.
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

CPU_SECONDS = 2.0  # CPU time of one request; ordinary templates take milliseconds
WALL_SECONDS = 120.0  # timeout of one request; long, because the machine may be busy
MAX_CHARACTERS = 1_000_000  # of output, plus
CHARACTERS_PER_CHARACTER = 8  # per character of the request: JSON writes some as six
MAX_ANSWER_BYTES = 1 << 30

_START = "import sys; sys.path += sys.argv[1:]; from numba_atomflow.text.template_worker import main; main()"
_LENGTH_BYTES = 8  # as in template_worker, which is not imported here because it imports Jinja


class TemplateExcessError(TextError):
    """A template exceeds its limits."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The model's chat template cannot be rendered ({reason}).")


class TemplateProcess:
    """A Python process that runs `template_worker`. Safe to use from several threads, and after a fork.

    Raises:
        TextError: the process cannot be started.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = self._start()

    def request(self, source: str, variables: Mapping[str, Any] | None) -> dict[str, str]:
        """Render a template, or only compile it if `variables` is None.

        Args:
            source: Jinja text.
            variables: of the template; JSON-ready data.

        Returns:
            ``{"text": ...}``, or "invalid", "refusal" or "failure" with the reason.

        Raises:
            TemplateExcessError: the template exceeded a limit of time, memory or output length, or crashed the process.
            TextError: the process cannot be started.
        """
        data = json.dumps(variables)
        characters = MAX_CHARACTERS + CHARACTERS_PER_CHARACTER * len(data)
        record = {"source": source, "characters": characters, "seconds": CPU_SECONDS}
        message = f'{json.dumps(record)[:-1]}, "variables": {data}}}'.encode()
        with self._lock:
            if not self._stop.alive or self._process.poll() is not None:
                self._stop()
                self._stop = self._start()
            try:
                answer: dict[str, str] = json.loads(self._exchange(message))
            except (EOFError, OSError) as error:
                raise TemplateExcessError(self._failure(error)) from error
            except BaseException:  # Ctrl-C: a late answer would be read as that of the next request
                self._stop()
                raise
        if "excess" in answer:
            raise TemplateExcessError(answer["excess"])
        return answer

    def abandon(self) -> None:
        """In a forked child: leave the process to the parent."""
        self._lock = threading.Lock()
        self._socket.close()
        self._process.returncode = 0  # not a child of this process, so no wait
        self._stop.detach()

    def _start(self) -> "weakref.finalize[..., TemplateProcess]":
        """Start the process; the finalizer that is returned ends it, at the latest with this object."""
        parent_end, child_end = socket.socketpair()
        flags = ["-s", "-S", "-P", "-X", "utf8"] + ["-B"] * sys.dont_write_bytecode
        # PYTHON* variables could load code or wait for a debugger; only PYTHONHOME is needed.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONHOME"
        }
        try:
            with child_end:
                self._process = subprocess.Popen(  # noqa: S603 - Python itself
                    [sys.executable, *flags, "-c", _START, *_import_path()],
                    stdin=child_end.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C goes to the parent only
                )
        except (OSError, ValueError, TypeError) as error:  # TypeError: sys.executable is None in an embedded Python
            parent_end.close()
            raise TextError(
                f"The process that renders the model's chat template cannot be started ({error}); check that "
                f"{sys.executable or 'Python'} can be run and that the machine allows more processes."
            ) from error
        self._socket = parent_end
        return weakref.finalize(self, _stop_process, parent_end, self._process, os.getpid())

    def _exchange(self, request: bytes) -> bytes:
        """Send a request and receive its answer.

        Raises:
            TimeoutError: no answer within `WALL_SECONDS`.
            EOFError, OSError: the process has ended.
        """
        deadline = time.monotonic() + WALL_SECONDS
        self._socket.settimeout(WALL_SECONDS)
        self._socket.sendall(len(request).to_bytes(_LENGTH_BYTES) + request)
        size = int.from_bytes(self._receive(_LENGTH_BYTES, deadline))
        return self._receive(min(size, MAX_ANSWER_BYTES), deadline)

    def _receive(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _failure(self, error: Exception) -> str:
        """End the process; why it gave no answer, in words."""
        if isinstance(error, TimeoutError):
            self._stop()
            return f"it takes longer than {WALL_SECONDS:g} seconds"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # it has closed its end of the socket, or will shortly
        code = self._process.poll()
        self._stop()
        if code == -signal.SIGPROF:
            return f"it takes more than {CPU_SECONDS:g} seconds of computing"
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"it crashes Python: {signal.Signals(-code).name}"
        return "its process ended without an answer, perhaps for lack of memory"


def _stop_process(connection: socket.socket, process: "subprocess.Popen[bytes]", owner: int) -> None:
    """Kill the process and reap it. A forked child only closes its copy of the connection."""
    connection.close()
    if os.getpid() == owner:
        process.kill()
        process.wait()


def _import_path() -> list[str]:
    """The folders of this package, Jinja and its dependency; sys.path of the process has only the standard library."""
    packages = [Path(__file__).absolute().parents[2]]
    for name in ("jinja2", "markupsafe"):
        found = find_spec(name)
        if found is None or found.origin is None:
            raise TextError(f"The Python package {name} is missing; install numba-atomflow again.")
        packages.append(Path(found.origin).absolute().parents[1])
    return list(dict.fromkeys(map(str, packages)))


_shared: "weakref.ref[TemplateProcess] | None" = None
_shared_lock = threading.Lock()


def shared_process() -> TemplateProcess:
    """The process of this program, started if necessary; it ends with the last reference to the object.

    Raises:
        TextError: it cannot be started.
    """
    global _shared  # noqa: PLW0603 - one per program
    with _shared_lock:
        process = _shared() if _shared is not None else None
        if process is None:
            process = TemplateProcess()
            _shared = weakref.ref(process)
        return process


@contextmanager
def prestarted() -> Iterator[None]:
    """Start the process of this program, in parallel with the work of the `with` block.

    Raises:
        TextError: it cannot be started.
    """
    process = shared_process()
    yield
    del process


def _after_fork_in_child() -> None:
    global _shared_lock  # noqa: PLW0603 - another thread may have held it at the fork
    _shared_lock = threading.Lock()
    process = _shared() if _shared is not None else None
    if process is not None:
        process.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)
