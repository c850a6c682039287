"""`numba-atomflow profile` on a tiny model."""

import csv
import io
import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused

FAST = ("-r", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a gigabyte five times has a test of its own."""
    monkeypatch.setattr("numba_atomflow.ops.bandwidth.read_bandwidth", lambda: 10.0)


def test_a_table_and_the_gap(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("profile", tiny_checkpoint, *FAST, "--depth", 20)
    assert outcome.code == 0, outcome.err
    head, table, sums = outcome.out.split("\n\n")
    assert "a decode step behind 20 tokens" in head
    header = " ".join(table.splitlines()[0].split())
    assert header == "kernel share per token mean us us per token MB each GB/s of memory read"
    assert {line.split()[0] for line in table.splitlines()[1:]} >= {"qkv", "attention", "vocabulary", "sample"}
    assert "the step as a whole" in sums


def test_other_formats(cli: InProcess, tiny_checkpoint: Path) -> None:
    record = json.loads(cli("profile", tiny_checkpoint, *FAST, "--json").out)
    assert {"kernels", "step_seconds", "gap_seconds", "ceilings", "machine", "date"} <= set(record)
    rows = list(csv.DictReader(io.StringIO(cli("profile", tiny_checkpoint, *FAST, "--format", "csv").out)))
    assert len(rows) == len(record["kernels"]) == 9
    assert "| kernel | share |" in cli("profile", tiny_checkpoint, *FAST, "--format", "md").out


def test_a_plot(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    picture = tmp_path / "roofline.svg"
    assert cli("profile", tiny_checkpoint, *FAST, "--plot", picture).code == 0
    assert "<svg" in picture.read_text()
    assert_refused(cli("profile", tiny_checkpoint, "--plot", tmp_path / "roofline.nonsense"), "roofline.nonsense")


def test_what_is_refused(cli: InProcess, tiny_checkpoint: Path) -> None:
    assert_refused(cli("profile", tiny_checkpoint, "--depth", "-1"), "depth is -1")
    assert_refused(cli("profile", tiny_checkpoint, "--repeats", 0), "repeats is 0")
    assert_refused(cli("profile", tiny_checkpoint, "--depth", 512), "512")
    assert_refused(cli("profile", "--geometry", "llama-3.1-8b"), "--random-weights")
