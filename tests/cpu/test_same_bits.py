"""A kernel's bits depend on its source and on the CPU, not on what else the process has compiled or loaded before."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from child_processes import run
from cli_runner import ROOT, environment


def run_kernels(home: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What tests/support/kernel_bits.py says about these kernels, called in this order by a process of its own."""
    completed = run(
        [sys.executable, ROOT / "tests" / "support" / "kernel_bits.py", *names], env=environment(home), check=True
    )
    answer: dict[str, dict[str, Any]] = json.loads(completed.stdout)
    return answer


@pytest.mark.slow
def test_bits_whatever_the_process_has_compiled_or_loaded_before(tmp_path: Path) -> None:
    everything = run_kernels(tmp_path / "a", ["static", "paged", "norm"])
    assert all(everything["code"].values()), "nothing was compiled"
    assert everything["bits"]["static"] == everything["bits"]["paged"]

    # Another order, and one kernel loaded before another with the same building block is compiled.
    first = run_kernels(tmp_path / "b", ["norm", "paged"])
    second = run_kernels(tmp_path / "b", ["paged", "static"])
    assert second["code"]["paged"] is None, "it was not loaded"
    compiled = second["code"] | first["code"]
    assert compiled == everything["code"]
    assert first["bits"] | second["bits"] == everything["bits"]

    loaded = run_kernels(tmp_path / "a", ["norm", "paged", "static"])
    assert not any(loaded["code"].values()), "something was compiled"
    assert loaded["bits"] == everything["bits"]
