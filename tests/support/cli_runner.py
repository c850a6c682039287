"""Running the command line: in this process where that is enough, else in one of its own."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from child_processes import run

from numba_atomflow import cli

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "from numba_atomflow.cli import main; main()"


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    out: str
    err: str


class InProcess:
    """Runs command lines in this process: fast, since numba is loaded once."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)


def command_line(*arguments: object, before: str = "") -> list[str]:
    """A command that runs the console script's function in the Python of this test, after the lines `before`."""
    return [sys.executable, "-c", f"{before}\n{ENTRY}", *(str(argument) for argument in arguments)]


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment, with a home of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "NUMBA_ATOMFLOW_HOME": str(home), "PYTHONPATH": path, "TERM": "dumb", **more}


def run_cli(
    home: Path, *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None, before: str = ""
) -> Outcome:
    """Run a command line in a process of its own."""
    command = command_line(*arguments, before=before)
    completed = run(command, stdin=stdin, env=environment(home, **(env or {})), encoding="utf-8")
    return Outcome(completed.returncode, completed.stdout, completed.stderr)


def assert_refused(outcome: Outcome, *culprits: object) -> None:
    """Exit code 2, nothing on standard output, and one sentence that names every culprit."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    assert lines[0].endswith(".")
    assert "Traceback" not in outcome.err
    for culprit in culprits:
        assert str(culprit) in lines[0]


def names_in(folder: Path) -> Sequence[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
