"""`numba-atomflow bench` on a tiny model: every format, comparison, and what is refused."""

import csv
import io
import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused

FAST = ("-n", 4, "-p", 8, "-r", 2, "--threads", 1, "--no-compile-times")


@pytest.fixture(autouse=True)
def ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a gigabyte five times has a test of its own."""
    monkeypatch.setattr("numba_atomflow.ops.bandwidth.read_bandwidth", lambda: 10.0)


def test_a_table_has_everything(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("bench", tiny_checkpoint, *FAST, "--depths", "0,16")
    assert outcome.code == 0
    head, table = outcome.out.split("\n\n")
    for word in ("model:", "device:", "versions: numba-atomflow", "commit:", "memory read 10.0 GB/s"):
        assert word in head
    header, *rows = table.splitlines()
    for column in ("prompt tok/s", "TTFT ms", "decode tok/s", "TPOT ms", "GB/s", "cold compile s", "warm compile s"):
        assert column in header
    assert [row.split()[0] for row in rows] == ["0", "16"]


def test_json_is_one_object_and_can_be_compared_with(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text(cli("bench", tiny_checkpoint, *FAST, "--json").out)
    assert json.loads(before.read_text())["settings"]["decode_tokens"] == 4
    outcome = cli("bench", tiny_checkpoint, *FAST, "--format", "json", "--compare", before)
    comparison = json.loads(outcome.out)["comparison"]
    (ratio,) = comparison["ratios"]
    assert ratio["decode"]["low"] <= ratio["decode"]["median"] <= ratio["decode"]["high"]
    assert comparison["differences"] == {}
    shown = cli("bench", tiny_checkpoint, *FAST, "--format", "md", "--compare", before).out
    assert "| depth | prompt speed | decode speed |" in shown
    assert "above 1: faster now" in shown


def test_csv_is_one_row_per_depth(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("bench", tiny_checkpoint, *FAST, "--format", "csv", "--depths", "0,16")
    rows = list(csv.DictReader(io.StringIO(outcome.out)))
    assert [row["depth"] for row in rows] == ["0", "16"]
    for row in rows:
        assert float(row["tpot_seconds_low"]) <= float(row["tpot_seconds"]) <= float(row["tpot_seconds_high"])
        assert row["ceiling memory read"] == "10.0"
        assert row["cold_compile_seconds"] == ""


def test_a_geometry_needs_no_model(cli: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_models import tiny_geometry

    from numba_atomflow.model.presets import PRESETS

    monkeypatch.setitem(PRESETS, "smollm2-135m", tiny_geometry())
    outcome = cli("bench", "--geometry", "smollm2-135m", "--random-weights", *FAST)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("model: smollm2-135m, random weights\n")
    without_file = cli("bench", "--geometry", "smollm2-135m", "--random-weights", *FAST, "--private-copy")
    assert_refused(without_file, "--private-copy", "random weights")


def test_contradictions_are_refused_before_anything_is_measured(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert_refused(cli("bench", "--geometry", "llama-3.2-1b"), "llama-3.2-1b", "--random-weights")
    assert_refused(cli("bench", "--geometry", "gpt-2", "--random-weights"), "gpt-2", "llama-3.1-8b")
    assert_refused(cli("bench", "--random-weights"), "--geometry")
    assert_refused(cli("bench", tiny_checkpoint, "--geometry", "llama-3.2-1b"), tiny_checkpoint, "llama-3.2-1b")
    assert_refused(cli("bench", tiny_checkpoint, "--depths", "0,x"), "--depths 0,x")
    assert_refused(cli("bench", tiny_checkpoint, "--depths", "-5"), "-5")
    assert_refused(cli("bench", tiny_checkpoint, "--depths", "400"), "912 positions", "512")
    assert_refused(cli("bench", tiny_checkpoint, "--compare", tmp_path / "no.json", *FAST), "no.json")
    assert_refused(cli("bench", "no-such-model"), "no-such-model")


def test_help_names_every_geometry(cli: InProcess) -> None:
    from numba_atomflow.model.presets import PRESETS

    text = " ".join(cli("bench", "--help").out.split())
    assert ", ".join(PRESETS) in text
