"""Commands at terminals of their own."""

import os
import pty
import re
import select
import subprocess
from contextlib import suppress
from pathlib import Path

from child_processes import Watchdog, wait
from cli_runner import command_line, environment

# Makes standard input the controlling terminal, so that Ctrl-C becomes a signal.
TAKE_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, home: Path, *arguments: object) -> None:
        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command_line(*arguments, before=TAKE_TERMINAL),
            env=environment(home, TERM="xterm"),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self._master = master
        self.shown = ""

    def expect(self, pattern: str) -> str:
        """Wait for a text; returns everything up to its end, and forgets it."""
        watchdog = Watchdog(self.process, f"the text {pattern!r}")
        while not (hit := re.search(pattern, self.shown)):
            if not select.select([self._master], [], [], 1)[0]:
                watchdog.check()
            else:
                try:
                    self.shown += os.read(self._master, 4096).decode(errors="replace")
                except OSError as error:  # on Linux: the other end is closed
                    raise AssertionError(f"{pattern!r} never came: {self.shown!r}") from error
        seen, self.shown = self.shown[: hit.end()], self.shown[hit.end() :]
        return seen

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def leave(self, keys: str) -> int:
        """Type keys after which the command should end; its exit code."""
        self.type(keys)
        return wait(self.process)

    def press_ctrl_c_until(self, pattern: str) -> str:
        """As `expect`, pressing the keys again when nothing comes: a second time too early would leave the program."""
        watchdog = Watchdog(self.process, f"the text {pattern!r} after Ctrl-C")
        while not re.search(pattern, self.shown):
            self.type("\x03")
            while not re.search(pattern, self.shown) and select.select([self._master], [], [], 5)[0]:
                self.shown += os.read(self._master, 4096).decode(errors="replace")
                watchdog.check()
            watchdog.check()
        return self.expect(pattern)

    def press_ctrl_c_until_it_leaves(self) -> int:
        """The exit code. Python's readline does not see a signal that comes when the prompt is shown but it does not
        wait for input yet; a person presses the keys again.
        """
        watchdog = Watchdog(self.process, "the end after Ctrl-C")
        while self.process.poll() is None:
            with suppress(OSError, subprocess.TimeoutExpired):  # OSError: it has just left
                self.type("\x03")
                self.process.wait(5)
            watchdog.check()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
