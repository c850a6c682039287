"""Child processes of tests, with limits on CPU time instead of wall-clock timeouts.

On a busy machine a child may take many times as long as on an idle one. A child is killed if it exceeds its CPU time
(an endless loop), or uses none for a while (a deadlock).
"""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import psutil

CPU_SECONDS = 240.0  # of a child and its children; a first start compiles every kernel
IDLE_SECONDS = 120.0  # wall-clock time without CPU time


class StuckError(AssertionError):
    """A child process does not end, or writes no more output."""


class Watchdog:
    """Limits the CPU time and the idle time of a process.

    Args:
        process: the child.
        what: the expected event, for the message.
    """

    def __init__(self, process: "subprocess.Popen[Any]", what: str) -> None:
        self._process = process
        self._what = what
        self._used = 0.0
        self._since = time.monotonic()

    def check(self) -> None:
        """To be called about every second.

        Raises:
            StuckError: the process exceeded its limits, and was killed.
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
    """CPU time of a process and its children, including terminated ones."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += sum(member.cpu_times()[:4])  # user and system, also of terminated children
    return total


def finish(process: "subprocess.Popen[Any]", stdin: Any = None) -> tuple[Any, Any]:
    """`Popen.communicate`: standard output and standard error once the process has ended."""
    watchdog = Watchdog(process, "the end of a process")
    while True:
        try:
            return process.communicate(stdin, timeout=1)
        except subprocess.TimeoutExpired:
            stdin = None  # already being sent
            watchdog.check()


def wait(process: "subprocess.Popen[Any]") -> int:
    """The exit code of a process that is expected to end."""
    watchdog = Watchdog(process, "the end of a process")
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            watchdog.check()


def run(
    command: Sequence[Any], *, stdin: Any = None, check: bool = False, **options: Any
) -> "subprocess.CompletedProcess[Any]":
    """`subprocess.run` with its output captured; `options` are those of `Popen`."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        out, err = finish(process, stdin)
    result = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check and result.returncode:
        raise AssertionError(f"{command} ended with {result.returncode}: {err}")
    return result


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[Any]", what: str) -> None:
    """Wait for what a running process does, `what` in words."""
    watchdog = Watchdog(process, what)
    while not condition():
        assert process.poll() is None, f"the process ended before {what}: {process.communicate()}"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
        watchdog.check()
