"""The benchmark on tiny models: measurements, derived figures, reports and their comparison."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.host.machine import commit, machine_record, nvidia_driver
from numba_atomflow.model.step import Head
from numba_atomflow.ops.bandwidth import read_bandwidth, total, total_reference
from numba_atomflow.perf import compile_times
from numba_atomflow.perf.bench import (
    BenchReport,
    Settings,
    bench,
    bytes_per_token,
    check_comparable,
    compare,
    differences,
    read_report,
)
from numba_atomflow.perf.compile_times import CompileTimes, measure_compile_times
from numba_atomflow.utils.stats import Spread, faster_half
from numba_atomflow.utils.tables import render

SETTINGS = Settings(prompt_tokens=6, decode_tokens=4, depths=(0, 20), repeats=3)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), max_seq_len=SETTINGS.positions(tiny_geometry()), threads=1) as engine:
        engine.backend.measure.ceilings = lambda: {"memory read": 10.0}  # measured once below
        yield engine


@pytest.fixture(scope="module")
def report(engine: Engine) -> BenchReport:
    return bench(engine, SETTINGS, CompileTimes(2.0, 1.0))


# --- measurements ----------------------------------------------------------------------------------------------------


def test_every_depth_has_every_figure(report: BenchReport) -> None:
    assert [result.depth for result in report.results] == [0, 20]
    for result in report.results:
        assert result.ttft.count == result.prompt_speed.count == result.decode_speed.count == 3
        assert result.tpot.count == 3 * 4
        assert result.prompt_speed.median == pytest.approx(6 / result.ttft.median)
        assert result.gigabytes_per_second == pytest.approx(result.bytes_per_token / result.tpot.median / 1e9)
    assert report.random_weights
    assert report.backend == "cpu"


def test_each_turn_starts_at_its_depth(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of prompts and decode steps, recorded at the backend."""
    seen: list[tuple[str, int, int]] = []
    prefill, decode = engine.backend.prefill, engine.backend.decode

    def watched_prefill(tokens: list[int], head: Head) -> None:
        seen.append(("prefill", engine.position, len(tokens)))
        prefill(tokens, head)

    def watched_decode() -> None:
        seen.append(("decode", engine.position, 1))
        decode()

    monkeypatch.setattr(engine.backend, "prefill", watched_prefill)
    monkeypatch.setattr(engine.backend, "decode", watched_decode)
    bench(engine, replace(SETTINGS, depths=(20,), repeats=1))
    turn = [("prefill", 20, 6), ("prefill", 20, 1), *(("decode", 21 + i, 1) for i in range(4))]
    assert seen == [("prefill", 0, 20), *turn, *turn]


def test_tpot_is_the_time_of_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = engine.backend.decode

    def slow() -> None:
        time.sleep(0.02)
        decode()

    monkeypatch.setattr(engine.backend, "decode", slow)
    (result,) = bench(engine, replace(SETTINGS, depths=(0,))).results
    assert result.tpot.low > 0.02
    assert result.decode_speed.high < 50
    assert result.ttft.median < 0.02 * 4


def test_bytes_per_token_are_weights_and_the_mean_length_of_the_cache(engine: Engine) -> None:
    g = engine.geometry
    a_position = g.layers * 2 * g.kv_dim * 4  # float32 keys and values
    mean = (11 + 12 + 13) / 3  # filled positions, the step's own included
    assert bytes_per_token(engine, 10, 3) == engine.weight_bytes_per_token + mean * a_position


def test_progress_counts_every_turn(engine: Engine) -> None:
    calls: list[tuple[str, int, int]] = []
    bench(engine, SETTINGS, progress=lambda *call: calls.append(call))
    assert [call[1] for call in calls] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert {call[2] for call in calls} == {8}
    assert calls[-1][0] == "depth 20"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"decode_tokens": -1}, "decode_tokens is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"depths": ()}, r"depths are \[\]"),
        ({"depths": (5, -1)}, r"depths are \[5, -1\]"),
        ({"depths": (5, 5)}, r"depths are \[5, 5\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(SETTINGS, **changes)


def test_a_depth_beyond_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match="512 and 6 tokens after it need 518 positions, but the model has 512"):
        replace(SETTINGS, depths=(0, 512)).positions(tiny_geometry())
    assert replace(SETTINGS, depths=(0, 500)).positions(tiny_geometry()) == 506


# --- ceilings and compile times --------------------------------------------------------------------------------------


def test_the_bandwidth_kernel_sums_every_element() -> None:
    import numpy as np

    x = np.random.default_rng(0).random(100_003, np.float32)
    assert total(x) == pytest.approx(total_reference(x), rel=1e-4)


def test_read_bandwidth_is_plausible() -> None:
    assert 0.2 < read_bandwidth(1 << 26, 2) < 5000


def test_the_cpu_backend_has_one_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba_atomflow.ops.bandwidth.read_bandwidth", lambda: 12.5)
    with Engine.random(tiny_geometry(), threads=1) as engine:
        assert engine.backend.measure.ceilings() == {"memory read": 12.5}


def test_two_starts_share_a_new_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a second start compiles nothing is shown in tests/e2e/test_compile_cache.py."""
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib\n"
        "compiled = pathlib.Path(os.environ['NUMBA_ATOMFLOW_HOME'], 'compiled')\n"
        "print(0.25 if compiled.exists() else 2.0)\n"
        "compiled.touch()\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    for _ in range(2):
        assert measure_compile_times(tiny_geometry(), max_seq_len=16, threads=1) == CompileTimes(cold=2.0, warm=0.25)


def test_a_start_prints_its_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"geometry": tiny_geometry().to_dict(), "max_seq_len": 16, "threads": 1}
    monkeypatch.setattr("sys.argv", ["compile_times", json.dumps(options)])
    assert compile_times.main() == 0
    assert float(capsys.readouterr().out) > 0


def test_an_error_of_a_start_is_reported_in_its_own_sentence() -> None:
    with pytest.raises(BackendError, match=r"^threads is 1000; this machine allows 1 to \d+\.$"):
        measure_compile_times(tiny_geometry(), threads=1000)


def test_a_start_that_crashes_advises_to_leave_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho killed >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(BackendError, match=r"failed \(killed\); leave them out with --no-compile-times"):
        measure_compile_times(tiny_geometry())


# --- reports ---------------------------------------------------------------------------------------------------------


def test_a_report_round_trips_through_json(report: BenchReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report.to_dict()))
    assert read_report(path) == report
    record = json.loads(path.read_text())
    (first, _) = record["results"]
    assert first["share_of_ceiling"] == {"memory read": pytest.approx(first["gigabytes_per_second"] / 10.0)}
    assert record["compile_times"] == {"cold": 2.0, "warm": 1.0}


def test_ceilings_of_earlier_reports_get_their_present_names(report: BenchReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    record = report.to_dict() | {"ceilings": {"loads": 4100.0, "copy engine": 4300.0}}
    path.write_text(json.dumps(record))
    assert read_report(path).ceilings == {"loads": 4100.0, "TMA": 4300.0}


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "{}", '{"format": "numba-atomflow bench 1"}', '{"format": "other"}']
)
def test_other_files_are_refused_as_reports(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(OptionError, match=r"report\.json is no report; make one with"):
        read_report(path)
    with pytest.raises(OptionError, match=r"missing\.json cannot be read"):
        read_report(tmp_path / "missing.json")


@pytest.mark.parametrize("value", [None, True, -1, 0, 1e400, "x", [], {}, "\x1b[2J", 10**900, 2**63])
@pytest.mark.parametrize(
    "path_in_record",
    [
        ("settings",),
        ("settings", "prompt_tokens"),
        ("settings", "depths"),
        ("settings", "depths", 0),
        ("results", 0, "depth"),
        ("results", 0, "decode_speed"),
        ("results", 0, "decode_speed", "low"),
        ("ceilings",),
        ("ceilings", "memory read"),
        ("machine",),
        ("machine", "versions"),
        ("date",),
        ("geometry", "layers"),
        ("compile_times", "cold"),
    ],
)
def test_a_report_with_a_wrong_value_is_refused_or_can_be_shown(
    report: BenchReport, tmp_path: Path, path_in_record: tuple[str | int, ...], value: object
) -> None:
    record = json.loads(json.dumps(report.to_dict()))
    parent = record
    for key in path_in_record[:-1]:
        parent = parent[key]
    parent[path_in_record[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(record))
    try:
        read = read_report(path)
    except OptionError:
        with pytest.raises(OptionError, match=r"report\.json is no report"):
            read_report(path)
        return
    compare(read, read)
    differences(read, report)
    assert read.date.isprintable()


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, '{"a":' * 5000, "\ud800"])
def test_pathological_json_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(OptionError, match=r"report\.json is no report"):
        read_report(path)


def test_a_ratio_is_now_over_earlier(report: BenchReport) -> None:
    def at_speed(speed: float) -> BenchReport:
        result = replace(report.results[1], decode_speed=Spread(speed, 0.9 * speed, 1.2 * speed, 5))
        return replace(report, results=[report.results[0], result])

    first, second = compare(at_speed(30.0), at_speed(20.0))
    assert (first.depth, first.decode_speed.median) == (0, 1.0)
    assert second.decode_speed == Spread(1.5, pytest.approx(1.125), pytest.approx(2.0), 5)


def test_only_depths_that_both_have_are_compared(report: BenchReport) -> None:
    assert [ratio.depth for ratio in compare(replace(report, results=report.results[1:]), report)] == [20]


def test_incomparable_reports_are_refused(report: BenchReport) -> None:
    with pytest.raises(OptionError, match="of another model, random"):
        check_comparable(report, tiny_geometry(layers=3), SETTINGS)
    with pytest.raises(OptionError, match="has -p 6 -n 4; give the same"):
        check_comparable(report, tiny_geometry(), replace(SETTINGS, decode_tokens=5))
    with pytest.raises(OptionError, match="no depth in common; give --depths 0,20"):
        check_comparable(report, tiny_geometry(), replace(SETTINGS, depths=(7,)))
    check_comparable(report, tiny_geometry(), replace(SETTINGS, depths=(7, 20)))


def test_other_differences_are_listed(report: BenchReport) -> None:
    assert differences(report, report) == {}
    machine = report.machine | {"commit": "abc", "versions": report.machine["versions"] | {"numba": "0.1"}}
    found = differences(report, replace(report, machine=machine, device="another"))
    assert found == {
        "commit": ("abc", report.machine["commit"]),
        "numba": ("0.1", report.machine["versions"]["numba"]),
        "device": ("another", report.device),
    }


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_spread_is_a_median_with_10th_and_90th_percentile() -> None:
    spread = Spread.of(range(11))
    assert spread == Spread(5.0, 1.0, 9.0, 11)
    assert spread.text(1, 2.0) == "10.0 (2.0-18.0)"
    assert Spread.from_dict(spread.to_dict()) == spread
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)


def test_the_faster_half_adds_up_where_medians_do_not() -> None:
    runs = [[1.0, 9.0], [9.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 2.0]]  # a stall hits one part or the other
    parts = faster_half(runs)
    assert parts.tolist() == pytest.approx([5 / 3, 4 / 3])
    assert parts.sum() == pytest.approx(faster_half([[sum(run)] for run in runs])[0])
    assert faster_half([[3.0, 4.0]]).tolist() == [3.0, 4.0]


def test_a_table_in_three_styles() -> None:
    headers, rows = ["kind", "us"], [["a", "1.0"], ["long, name", "12.5"]]
    assert render("table", headers, rows) == "kind          us\na            1.0\nlong, name  12.5\n"
    assert render("md", headers, rows) == "| kind | us |\n| --- | ---: |\n| a | 1.0 |\n| long, name | 12.5 |\n"
    assert render("csv", headers, rows) == 'kind,us\na,1.0\n"long, name",12.5\n'


def test_the_machine_is_described(tmp_path: Path) -> None:
    record = machine_record()
    assert record["cpu"]
    assert record["versions"]["numba"]
    assert commit(tmp_path) is None
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)\n")
    assert nvidia_driver(driver) == "580.65.06"
    assert nvidia_driver(tmp_path / "missing") is None
