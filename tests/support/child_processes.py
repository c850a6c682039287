"""Child processes of tests: waited for by what they do, not by the clock.

On a busy machine a child may take many times as long as on a quiet one. So a test gives up on a child that has used
up its share of CPU time, or that has used none at all for a while: an endless loop is the one, a deadlock the other.
"""

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

CPU_SECONDS = 240.0  # of a child and its own children; a first start compiles every kernel
IDLE_SECONDS = 120.0  # of the clock, in which they used none


class StuckError(AssertionError):
    """A child process does not end, or says nothing any more."""


class Patience:
    """Watches a process while something is waited for.

    Args:
        process: the child.
        what: is waited for, for the message.
    """

    def __init__(self, process: "subprocess.Popen[Any]", what: str) -> None:
        self._process = process
        self._what = what
        self._used = 0.0
        self._since = time.monotonic()

    def check(self) -> None:
        """Call every second or so.

        Raises:
            StuckError: the process is out of CPU time, or stands still. It is killed.
        """
        used = _cpu_seconds(self._process.pid)
        now = time.monotonic()
        if used > self._used:
            self._used, self._since = used, now
        if used < CPU_SECONDS and now - self._since < IDLE_SECONDS:
            return
        self._process.kill()
        raise StuckError(f"{self._what}: {used:.0f} s of CPU time, none in the last {now - self._since:.0f} s")


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, ended ones included."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += sum(one.cpu_times()[:4])  # user and system, its own and its ended children's
    return total


def finish(process: "subprocess.Popen[Any]", stdin: Any = None) -> tuple[Any, Any]:
    """`Popen.communicate`: standard output and standard error once the process has ended."""
    patience = Patience(process, "the end of a process")
    while True:
        try:
            return process.communicate(stdin, timeout=1)
        except subprocess.TimeoutExpired:
            stdin = None  # it is on its way
            patience.check()


def wait(process: "subprocess.Popen[Any]") -> int:
    """The exit code of a process that is expected to end."""
    patience = Patience(process, "the end of a process")
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            patience.check()


def run(
    command: Sequence[Any], *, stdin: Any = None, check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """`subprocess.run` with its output captured; `options` are those of `Popen`."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        out, err = finish(process, stdin)
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}: {err}")
    return done
