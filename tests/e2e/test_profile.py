"""`numba-atomflow profile` on a tiny model."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cli_runner import InProcess, assert_refused

from numba_atomflow.backends.base import DecodePath
from numba_atomflow.backends.trace import StepTrace

FAST = ("-r", 2, "--threads", 1)


@pytest.fixture(autouse=True)
def ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a gigabyte five times has a test of its own."""
    monkeypatch.setattr("numba_atomflow.ops.bandwidth.read_bandwidth", lambda: 10.0)


def test_a_table_and_the_gap(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("profile", tiny_checkpoint, *FAST, "--depth", 20)
    assert outcome.code == 0, outcome.err
    head, table, sums = outcome.out.split("\n\n")
    assert "a decode step after 20 tokens" in head
    header = " ".join(table.splitlines()[0].split())
    assert header == "kernel share per token mean us us per token MB each GB/s of memory read"
    assert {line.split()[0] for line in table.splitlines()[1:]} >= {"qkv", "attention", "lm_head", "sample"}
    assert "the whole step" in sums


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
    assert_refused(cli("profile", tiny_checkpoint, "--depth", 512), "--depth is 512", "511")
    assert_refused(cli("profile", "--geometry", "llama-3.1-8b"), "--random-weights")


# --- a traced step ---------------------------------------------------------------------------------------------------

GRAPH = DecodePath("graph", "the GPU is an old one")


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> StepTrace:
    """A backend that seems to have the persistent kernel: the trace is one that a GPU recorded, of another model."""
    record = json.loads((Path(__file__).resolve().parents[1] / "recorded" / "step_trace.json").read_text())
    events = ("begun", "staged", "done", "copy_begun", "copy_done", "waited")
    trace = StepTrace(tuple(record["names"]), *(np.array(record[event], np.float64) for event in events))
    monkeypatch.setattr("numba_atomflow.backends.cpu.CpuBackend.decode_path", DecodePath("persistent"))
    monkeypatch.setattr("numba_atomflow.backends.cpu.measure.CpuMeasurements.trace_step", lambda *_: trace)
    return trace


def test_a_timeline_and_its_numbers(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, trace: StepTrace) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    picture = tmp_path / "timeline.svg"
    record = json.loads(cli("profile", tiny_checkpoint, *FAST, "--timeline", picture, "--json").out)
    assert "waiting for the slowest SM" in picture.read_text()
    assert record["ops_measured"] == "as traced"
    assert record["trace"] == [asdict(row) for row in trace.phases()]
    assert set(record["trace"][0]) >= {"kind", "count", "staging_seconds", "copy_wait_seconds", "barrier_seconds"}


@pytest.mark.usefixtures("trace")
def test_the_table_says_how_parts_of_one_kernel_were_timed(cli: InProcess, tiny_checkpoint: Path) -> None:
    for form in ("table", "md"):
        out = cli("profile", tiny_checkpoint, *FAST, "--format", form).out
        assert "parts of one kernel, timed by its trace" in out
        assert "ops as traced" in out.splitlines()[-1]


def test_other_ways_have_no_trace(cli: InProcess, tiny_checkpoint: Path) -> None:
    record = json.loads(cli("profile", tiny_checkpoint, *FAST, "--json").out)
    assert (record["trace"], record["ops_measured"]) == (None, "one by one")
    out = cli("profile", tiny_checkpoint, *FAST).out
    assert "traced" not in out
    assert "ops one by one" in out


@pytest.mark.parametrize(
    ("path", "words"), [(None, ["this is the CPU backend"]), (GRAPH, ["graph, because the GPU is an old one"])]
)
def test_a_timeline_needs_the_persistent_kernel(
    cli: InProcess,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: DecodePath | None,
    words: list[str],
) -> None:
    pytest.importorskip("matplotlib", reason="what is missing would be matplotlib")
    monkeypatch.setattr("numba_atomflow.backends.cpu.CpuBackend.decode_path", path)
    monkeypatch.setattr("numba_atomflow.perf.profile.profile", lambda *_: pytest.fail("refused too late"))
    outcome = cli("profile", tiny_checkpoint, *FAST, "--timeline", tmp_path / "timeline.svg")
    assert_refused(outcome, "--timeline", *words)
    assert not list(tmp_path.iterdir())


def test_a_timeline_needs_the_name_of_a_picture(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="what is missing would be matplotlib")
    assert_refused(cli("profile", tiny_checkpoint, "--timeline", tmp_path / "a.nonsense"), "--timeline", "a.nonsense")
