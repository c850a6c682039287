"""The command ``validate --widths``."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import InProcess, assert_refused

TEXT = "The river begins in the Alps."


def test_a_model_passes(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("validate", tiny_checkpoint, "--widths", "1,2,4,8", "-p", TEXT, "--backend", "cpu")
    assert outcome.code == 0, outcome
    first, last = outcome.out.splitlines()
    assert first.endswith(f": 64 positions after {len(TEXT)} prompt tokens")
    assert last == "PASS: steps of 1, 2, 4, 8 tokens have the bits of decode steps at 64 positions."


def test_a_failure_is_exit_code_1(cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numba_atomflow.backends.cpu import CpuBackend

    verify = CpuBackend.verify

    def wrong(backend: CpuBackend, tokens: list[int]) -> Any:
        return -verify(backend, tokens)

    monkeypatch.setattr(CpuBackend, "verify", wrong)
    outcome = cli("validate", tiny_checkpoint, "--widths", "2", "-p", TEXT, "--backend", "cpu", "--json")
    assert outcome.code == 1
    record = json.loads(outcome.out)
    assert record["passed"] is False
    assert record["widths"][0]["part"] == "logits"
    assert record["verdict"].startswith("FAIL: steps of 2 tokens differ from decode steps, first in logits")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--widths", "2"], "needs a text"),
        (["--widths", "2,x", "-p", TEXT], "--widths '2,x' is no list of numbers"),
        (["--widths", "", "-p", TEXT], "--widths '' is no list of numbers"),
        (["--widths", "0", "-p", TEXT], "from 1 on"),
        (["--widths", "16", "-p", TEXT], "at most 8 tokens"),
        (["--widths", "2", "-p", TEXT, "--isolate"], "whole runs"),
        (["--widths", "2", "-p", TEXT, "--junit", "out.xml"], "--junit"),
        (["--widths", "2", "-p", TEXT, "--replay", "2"], "one reference"),
    ],
)
def test_what_is_refused(cli: InProcess, tiny_checkpoint: Path, given: list[str], message: str) -> None:
    assert_refused(cli("validate", tiny_checkpoint, *given, "--backend", "cpu"), message)
