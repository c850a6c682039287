"""scripts/soak.py on the CPU: passes identical repetitions, and detects differences."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from soak import PROMPT, TINY, soak, soak_speculation  # noqa: E402

from numba_atomflow import Engine  # noqa: E402
from numba_atomflow.model.step import SAMPLE, Attention  # noqa: E402


def test_the_script_repeats_a_reply_on_the_cpu() -> None:
    command = [sys.executable, "scripts/soak.py", "--steps", "30", "--reply", "11", "--backend", "cpu", "--json"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads(completed.stdout)
    assert (record["passes"], record["steps"], record["first_difference"]) == (3, 30, None)


def test_a_different_pass_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.random(TINY, "cpu", 32) as engine:
        logits = engine.backend.logits
        calls = []

        def disturbed(start: int, stop: int) -> object:
            calls.append(start)
            found = logits(start, stop)
            return np.nextafter(found, np.float32(np.inf)) if len(calls) == 3 else found

        monkeypatch.setattr(engine.backend, "logits", disturbed)
        record = soak(engine, 100, PROMPT, 5)
    assert (record["passes"], record["first_difference"]) == (3, 2)


def test_the_script_speculates_at_random_on_the_cpu() -> None:
    command = [sys.executable, "scripts/soak.py", "--speculate", "--steps", "40", "--reply", "21", "--backend", "cpu"]
    completed = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads(completed.stdout)
    assert record["first_difference"] is None
    assert record["proposed"] > record["accepted"] > 0
    assert record["steps"] + record["accepted"] == 20 * record["passes"]  # the first token comes from the prompt


@pytest.mark.parametrize("what", ["tokens", "keys and values"])
def test_a_different_speculative_pass_is_detected(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.random(TINY, "cpu", 32) as engine:
        verify = engine.backend.verify
        calls = []

        def disturbed(tokens: list[int]) -> object:
            calls.append(tokens)
            logits = verify(tokens)
            if len(calls) == 3 and what == "tokens":
                logits = -logits
            if len(calls) == 3 and what == "keys and values":
                op = next(op for op in engine.backend.step(1, SAMPLE) if isinstance(op, Attention))
                with engine.backend.memory() as memory:
                    memory.write(op.keys.rows(2, 3), memory.read(op.keys.rows(2, 3)) * np.float32(1.0001))
            return logits

        monkeypatch.setattr(engine.backend, "verify", disturbed)
        record = soak_speculation(engine, 100, PROMPT, 16)
    assert (record["passes"], record["first_difference"]) == (1, 0)


def test_bad_numbers_are_refused() -> None:
    command = [sys.executable, "scripts/soak.py", "--steps", "0"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert "--steps" in completed.stderr
