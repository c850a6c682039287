"""The profile of a decode step on tiny models: timing, rows of the table, the plot."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.errors import DestinationError, OptionError
from numba_atomflow.model.step import SAMPLE, Op
from numba_atomflow.perf.profile import KernelRow, ProfileReport, kernel_rows, plot, profile

DEPTH = 30


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), max_seq_len=64, threads=1) as engine:
        engine.backend.measure.ceilings = lambda: {"memory read": 10.0, "copies": 12.0}
        yield engine


@pytest.fixture(scope="module")
def report(engine: Engine) -> ProfileReport:
    return profile(engine, DEPTH, repeats=6)


def test_every_op_of_the_step_is_in_the_table(report: ProfileReport) -> None:
    counts = {kernel.kind: kernel.count for kernel in report.kernels}
    layers = dict.fromkeys(("qkv", "attention", "o", "gate_up", "down"), 2)
    assert counts == layers | {"embed": 1, "lm_head": 1, "sample": 1, "advance": 1}
    assert all(kernel.seconds > 0 for kernel in report.kernels)
    assert [kernel.seconds for kernel in report.kernels] == sorted((k.seconds for k in report.kernels), reverse=True)


def test_bytes_are_weights_cache_and_activations(engine: Engine, report: ProfileReport) -> None:
    g = engine.geometry
    moved = {kernel.kind: kernel.moved_bytes for kernel in report.kernels}
    scales = 4 * -(-g.hidden // 128)
    vocabulary = g.vocabulary * (g.hidden + scales) + 4 * g.hidden  # weights, scales, norm
    assert moved["lm_head"] == vocabulary + 4 * (g.hidden + g.hidden + g.vocabulary)
    cache = 2 * (DEPTH + 1) * g.kv_dim * 4
    assert moved["attention"] == g.layers * (cache + 4 * (g.q_dim + g.q_dim) + 8)
    weights = sum(op.weight_bytes for op in engine.backend.step(1, SAMPLE))
    assert sum(moved.values()) > weights + g.layers * cache


def test_ops_are_summed_by_kind(engine: Engine) -> None:
    ops = engine.backend.step(1, SAMPLE)
    rows = kernel_rows([(op, 2e-6 if op.kind == "down" else 1e-6) for op in ops], 1)
    assert (rows[0].kind, rows[0].count) == ("down", 2)
    assert rows[0].seconds == pytest.approx(4e-6)
    assert rows[0].mean_seconds == pytest.approx(2e-6)
    assert KernelRow("a", 2, 1e-6, 5000).gigabytes_per_second == pytest.approx(5)


def test_a_slow_op_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_sampler: object, _logits: object) -> int:
        time.sleep(0.02)
        return 5

    monkeypatch.setattr("numba_atomflow.sampling.Sampler.choose", slow)
    report = profile(engine, DEPTH, repeats=3)
    first = report.kernels[0]
    assert (first.kind, first.count) == ("sample", 1)
    assert first.seconds > 0.02
    assert report.ops_seconds > 0.02
    assert report.step_seconds > 0.02
    assert abs(report.gap_seconds) < 0.02


def test_every_run_starts_at_the_depth(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = set()
    seek = engine.backend.seek

    def watched(position: int) -> None:
        positions.add(position)
        seek(position)

    profile(engine, 0, 1)
    monkeypatch.setattr(engine.backend, "seek", watched)
    engine.feed([5] * DEPTH)
    positions.clear()
    ops = engine.backend.measure.time_ops(2)
    engine.backend.measure.time_step(2)
    assert positions == {DEPTH}
    step = engine.backend.step(1, SAMPLE)
    assert [(type(op), vars(op)) for op, _ in ops] == [(type(op), vars(op)) for op in step]
    assert all(isinstance(op, Op) and seconds > 0 for op, seconds in ops)


def test_a_profile_leaves_the_engine_usable(engine: Engine) -> None:
    engine.reset()
    before = engine.feed([5, 6, 7])
    profile(engine, DEPTH, 1)
    assert engine.position == DEPTH
    engine.reset()
    assert (engine.feed([5, 6, 7]) == before).all()


def test_the_record_has_shares_of_the_fastest_ceiling(report: ProfileReport) -> None:
    record = report.to_dict()
    assert report.ceiling == ("copies", 12.0)
    for kernel in record["kernels"]:
        assert kernel["share_of_ceiling"] == pytest.approx(kernel["moved_bytes"] / kernel["seconds"] / 12e9)
    assert sum(kernel["share_of_time"] for kernel in record["kernels"]) == pytest.approx(1)
    assert record["gap_seconds"] == pytest.approx(record["step_seconds"] - record["ops_seconds"])
    assert record["repeats"] == 10


def test_numbers_out_of_range_are_refused(engine: Engine) -> None:
    with pytest.raises(OptionError, match="depth is -1"):
        profile(engine, -1)
    with pytest.raises(OptionError, match="repeats is 0"):
        profile(engine, 0, 0)


def test_a_plot_shows_every_kernel_and_every_ceiling(report: ProfileReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    picture = tmp_path / "roofline.svg"
    plot(report, picture)
    assert [path.name for path in tmp_path.iterdir()] == ["roofline.svg"]
    drawn = picture.read_text()
    for text in ("lm_head x 1", "qkv x 2", "memory read", "copies"):
        assert text in drawn  # matplotlib notes each text beside its outlines
    with pytest.raises(DestinationError, match="cannot be written"):
        plot(report, tmp_path / "missing" / "roofline.svg")
