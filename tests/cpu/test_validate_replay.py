"""Replay: equal bits pass, and a bit that changes from run to run is found."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.convert import convert
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.model.step import NO_LOGITS, Attention
from numba_atomflow.validate import ReplayReport, replay

GEOMETRY = tiny_geometry(layers=3, vocabulary=SMALLEST_VOCABULARY)
PROMPT = np.random.default_rng(0).integers(3, SMALLEST_VOCABULARY, 20).tolist()
STEPS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_hf_folder(folder / "hf", GEOMETRY)
    return convert(folder / "hf", folder / "tiny.safetensors")


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, "cpu", 64, threads=1) as engine:
        yield engine


def run(engine: Engine, runs: int = 2) -> ReplayReport:
    return replay(engine.backend, GEOMETRY, PROMPT, STEPS, runs)


def test_equal_bits_pass(engine: Engine) -> None:
    report = run(engine, runs=3)
    assert report.passed
    assert report.verdict() == "PASS: 3 runs gave the same bits."
    assert [part.name for part in report.parts] == [
        *(f"layer.{i}.{name}" for i in range(3) for name in "kv"),
        "logits",
        "tokens",
    ]
    assert {part.elements for part in report.parts} == {24 * GEOMETRY.kv_dim, GEOMETRY.vocabulary, 24}
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_the_runs_leave_what_a_generation_leaves(engine: Engine) -> None:
    run(engine)
    with engine.backend.memory() as memory:
        cache = [memory.read(op.keys) for op in engine.backend.step(1, NO_LOGITS) if isinstance(op, Attention)]
    engine.generate_tokens(PROMPT, SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)).finish()
    for layer, keys in enumerate(engine.snapshot().keys):
        assert len(keys) == len(PROMPT) + STEPS
        np.testing.assert_array_equal(keys.reshape(len(keys), -1), cache[layer][: len(keys)])


@pytest.mark.parametrize("value", [1e-30, -0.0])
def test_the_first_other_bit_is_found(engine: Engine, value: float) -> None:
    """A value that only some runs write: far below any tolerance, or a zero with another sign."""
    calls = []

    def unsteady(rows: NDArray[np.float32], position: int) -> NDArray[np.float32] | None:
        if position != 21:
            return None
        changed = rows.copy()
        changed[0, 7] = 0.0
        calls.append(position)
        if len(calls) == 3:
            changed[0, 7] = value
        return changed

    with engine.edit({"layer.1.v": unsteady}):
        report = run(engine, runs=3)
    assert not report.passed
    assert report.first is not None
    assert (report.first.name, report.first.position, report.first.run) == ("layer.1.v", 21, 3)
    assert report.verdict() == (
        "FAIL: run 3 differs from run 1, first in layer.1.v at position 21 (1 of 3072 elements of layer.1.v)."
    )


def test_logits_and_tokens_that_change_are_found_at_their_positions(engine: Engine) -> None:
    calls: list[int] = []

    def unsteady(rows: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        calls.append(position)
        return rows + 1 if position == 23 and calls.count(23) > 2 else rows  # a decode step, and the last row alone

    with engine.edit({"logits": unsteady}):
        report = run(engine)
    assert report.first is not None
    assert (report.first.name, report.first.position) == ("logits", 23)


@pytest.mark.parametrize("runs", [1, 0, -1])
def test_one_run_cannot_be_compared(engine: Engine, runs: int) -> None:
    with pytest.raises(OptionError, match="at least 2 runs"):
        run(engine, runs)


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextError):
        replay(engine.backend, GEOMETRY, PROMPT, 60)
    with pytest.raises(OptionError, match="empty"):
        replay(engine.backend, GEOMETRY, [])
