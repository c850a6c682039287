"""The command ``validate --diff-gpus``, with CPU backends in place of one GPU and of several."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_runner import InProcess, assert_refused

from numba_atomflow import Engine

TEXT = "The river."
GIVEN = ("--diff-gpus", "--gpus", "2", "-p", TEXT, "--decode-steps", "2")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, str]]:
    """GPUs, decode path and prefill path of each engine that is loaded; all run on the CPU."""
    load, asked = Engine.load, list[tuple[int, str, str]]()

    def pretend(model: str, backend: Any, *rest: Any, gpus: int, decode: str, prefill: str, **_others: Any) -> Engine:
        asked.append((gpus, decode, prefill))
        return load(model, "cpu", *rest)

    monkeypatch.setattr(Engine, "load", pretend)
    return asked


def test_several_gpus_are_compared_with_one(
    cli: InProcess, tiny_checkpoint: Path, loaded: list[tuple[int, str, str]]
) -> None:
    outcome = cli("validate", tiny_checkpoint, *GIVEN)
    assert outcome.code == 0, outcome
    assert loaded == [(1, "persistent", "gemv"), (2, "auto", "auto")]
    first, last = outcome.out.splitlines()
    assert first.endswith(f": {len(TEXT)} prompt tokens, 2 decode steps")
    assert last == "PASS: keys, values, logits and tokens have the bits of one GPU at 12 positions."


def test_a_failure_is_exit_code_1(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[tuple[int, str, str]]
) -> None:
    from numba_atomflow.backends.cpu import CpuBackend

    prefill = CpuBackend.prefill

    def wrong(backend: Any, tokens: list[int], head: Any) -> None:
        prefill(backend, tokens, head)
        if len(loaded) == 2:
            backend._array("logits")[0, 3] *= -1

    monkeypatch.setattr(CpuBackend, "prefill", wrong)
    outcome = cli("validate", tiny_checkpoint, *GIVEN, "--json")
    assert outcome.code == 1
    record = json.loads(outcome.out)
    assert (record["part"], record["position"], record["passed"]) == ("logits", 0, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--diff-gpus", "-p", TEXT], "--diff-gpus compares several GPUs with one; give --gpus N"),
        (["--diff-gpus", "--gpus", "1", "-p", TEXT], "give --gpus N"),
        (["--diff-gpus", "--gpus", "2"], "--diff-gpus needs a text"),
        ([*GIVEN, "--backend", "cpu"], "--gpus 2 is for the CUDA backend"),
        ([*GIVEN, "--decode", "graph"], "--decode graph is for one GPU"),
        ([*GIVEN, "--prefill-chunk", "64"], "--prefill-chunk is for one GPU"),
        ([*GIVEN, "--widths", "2"], "one reference"),
        ([*GIVEN, "--added"], "--diff-gpus compares whole runs"),
        ([*GIVEN, "--html", "out.html"], "--diff-gpus writes no report files"),
    ],
)
def test_what_is_refused(cli: InProcess, tiny_checkpoint: Path, given: list[str], message: str) -> None:
    assert_refused(cli("validate", tiny_checkpoint, *given), message)
