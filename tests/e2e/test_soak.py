"""scripts/soak.py on the CPU: passes identical repetitions, and detects differences."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from soak import PROMPT, TINY, soak  # noqa: E402

from numba_atomflow import Engine  # noqa: E402


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


def test_bad_numbers_are_refused() -> None:
    command = [sys.executable, "scripts/soak.py", "--steps", "0"]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert completed.returncode == 2
    assert "--steps" in completed.stderr
