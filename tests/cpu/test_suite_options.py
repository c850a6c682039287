"""The options of tests/conftest.py that choose tests: what one run has passed, another can leave out."""

import re
import sys
from pathlib import Path

from child_processes import run
from cli_runner import ROOT

TESTS = ("tests/cpu/test_json_text.py", "tests/cpu/test_atomic.py")


def run_pytest(*arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *TESTS, *arguments]
    completed = run([str(part) for part in command], cwd=ROOT, text=True)
    return completed.returncode, completed.stdout


def test_tests_that_passed_are_left_out_and_the_others_run(tmp_path: Path) -> None:
    passed = tmp_path / "passed"
    code, output = run_pytest("--record-passed", passed)
    assert code == 0, output
    names = passed.read_text().splitlines()
    assert {name.partition("::")[0] for name in names} == set(TESTS)

    passed.write_text("".join(f"{name}\n" for name in names[1:]))  # as if the first had been skipped
    code, output = run_pytest("--leave-out", passed)
    assert code == 0, output
    assert re.search(rf"\b1 passed\b.*\b{len(names) - 1} deselected\b", output), output
