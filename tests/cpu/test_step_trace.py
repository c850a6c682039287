"""The time of a traced step, by op: a constructed trace, and one recorded on a GPU."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.errors import DestinationError
from numba_atomflow.perf.timeline import draw_timeline

RECORDED = Path(__file__).resolve().parents[1] / "recorded" / "step_trace.json"
EVENTS = ("begun", "staged", "done", "copy_begun", "copy_done", "waited")
NO = np.nan


def recorded() -> tuple[dict[str, Any], StepTrace]:
    """The file, and what it says as a trace."""
    record = json.loads(RECORDED.read_text())
    return record, StepTrace(tuple(record["names"]), *(np.array(record[event], np.float64) for event in EVENTS))


@pytest.fixture
def by_hand() -> StepTrace:
    """Two CTAs; the second has no work in op 2 (attention), and starts op 3 (o) while the first still runs 2."""
    return StepTrace(
        names=("embed", "layer.0.qkv", "layer.0.attention", "layer.0.o"),
        begun=np.array([[NO, 100, 400, 700], [NO, 80, 500, 500]]),
        staged=np.array([[NO, 200, 450, 720], [NO, 150, NO, 650]]),
        done=np.array([[NO, 390, 690, 900], [NO, 490, 500, 800]]),
        copy_begun=np.array([[NO, 10, NO, 300], [NO, 20, NO, 310]]),
        copy_done=np.array([[NO, 60, NO, 390], [NO, 70, NO, 400]]),
        waited=np.array([[NO, 30, NO, NO], [NO, 50, NO, 10]]),
    )


def test_ops_end_with_their_last_cta_and_add_up_to_the_step(by_hand: StepTrace) -> None:
    assert by_hand.ends.tolist() == [100, 490, 690, 900]
    assert by_hand.op_seconds == pytest.approx([100e-9, 390e-9, 200e-9, 210e-9])


def test_no_time_is_counted_twice(by_hand: StepTrace) -> None:
    """Op 1 begins at 100, op 2 at 490, op 3 at 690."""
    qkv, attention, o = by_hand.phases()
    assert phases(qkv) == pytest.approx([75, 40, 225, 50])  # of (100, 50), (30, 50), (160, 290) and (100, 0)
    assert phases(attention) == pytest.approx([0, 0, 100, 100])  # the second CTA has no work: all of it is waiting
    assert phases(o) == pytest.approx([15, 5, 140, 50])  # the second had all it reads at 690: of (30, 0), (0, 10), ...


def phases(row: Any) -> list[float]:
    """Nanoseconds."""
    parts = row.staging_seconds, row.copy_wait_seconds, row.compute_seconds, row.barrier_seconds
    return [part * 1e9 for part in parts]


def test_phases_add_up_to_the_step_that_a_gpu_recorded() -> None:
    _, trace = recorded()
    rows = trace.phases()
    assert [(row.kind, row.count) for row in rows] == [
        *((kind, 3) for kind in ("qkv", "attention", "o", "gate_up", "down")),
        ("vocabulary", 1),
    ]
    assert min(min(phases(row)) for row in rows) >= 0
    ops = sum(row.seconds * row.count for row in rows)
    assert ops + trace.op_seconds[0] == pytest.approx(trace.ends[-1] / 1e9) == pytest.approx(sum(trace.op_seconds))
    assert 200 < trace.ends[-1] / 1e3 < 300  # us


def test_one_kind_of_the_recorded_step_by_pencil() -> None:
    record, trace = recorded()
    (row,) = (row for row in trace.phases() if row.kind == "gate_up")
    sums, count = [0.0, 0.0, 0.0, 0.0], 0
    for op in (4, 9, 14):
        assert record["names"][op].endswith("gate_up")
        before = max(done[op - 1] for done in record["done"])
        last = max(done[op] for done in record["done"])
        for cta in range(len(record["done"])):
            staged, done, waited = (record[event][cta][op] for event in ("staged", "done", "waited"))
            assert before < staged < done  # nothing to be cut off here
            for phase, took in enumerate((staged - before, waited, done - staged - waited, last - done)):
                sums[phase] += took
            count += 1
    assert count == 3 * 17
    assert phases(row) == pytest.approx([total / count for total in sums])
    assert row.copy_wait_seconds > 1e-6  # 52 MB do not come by themselves


def test_times_of_different_shapes_are_no_trace(by_hand: StepTrace) -> None:
    with pytest.raises(ValueError, match="3 ops"):
        StepTrace(by_hand.names[:3], *(getattr(by_hand, event) for event in EVENTS))


# --- the trace buffer ------------------------------------------------------------------------------------------------


def test_the_kernels_clocks_become_a_trace() -> None:
    """The common clock counts nanoseconds from 1970, and cycles are counted by each SM."""
    pytest.importorskip("numba_cuda", reason="the kernel is made of it; there is none for macOS")
    from numba_atomflow.backends.cuda.kernels import ModelKernels
    from numba_atomflow.backends.cuda.persistent import PersistentStep
    from numba_atomflow.memory.view import View
    from numba_atomflow.ops.cuda.persistent import trace as events
    from numba_atomflow.ops.cuda.runtime.chip import Chip

    chip = Chip(sms=2, shared_bytes=232448, capability=(9, 0))
    kernels = ModelKernels(tiny_geometry(), chip, persistent=True)
    words = View("w", 0, (1,), "uint32")
    step = PersistentStep(kernels, {}, {}, {"w": words}, words, None)
    ops = step.shape.ops
    times = np.zeros((2, ops, events.EVENTS), np.int64)
    now = 1_795_000_000_000_000_003
    times[0, 0, :4] = now, 5_000, now + 1_000, 6_500  # 1.5 cycles in a nanosecond
    times[1, 0, :4] = now + 40, 70_000, now + 1_040, 72_000
    times[0, 1] = [5_150, 5_300, 5_600, 5_030, 5_060, 45]
    times[1, 3, events.DONE] = 71_002
    trace = step.trace([SimpleNamespace(name=f"op {i}") for i in range(ops + 2)], times.reshape(-1))  # type: ignore[misc]
    assert trace.names == tuple(f"op {i}" for i in range(ops))
    found = [getattr(trace, event)[0, 1] for event in EVENTS]
    assert found == pytest.approx([100, 200, 400, 20, 40, 30])
    assert trace.done[1, 3] == pytest.approx(40 + 501)
    assert np.isnan(trace.begun[:, 0]).all()
    assert np.isnan(trace.begun[1]).all()


def test_the_kernel_that_takes_times_is_another_one() -> None:
    pytest.importorskip("numba_cuda", reason="the kernel is made of it; there is none for macOS")
    from numba_atomflow.backends.cuda.kernels import ModelKernels
    from numba_atomflow.ops.cuda.runtime.chip import Chip

    kernels = ModelKernels(tiny_geometry(), Chip(132, 232448, (9, 0)), persistent=True)
    traced, plain = kernels.persistent_traced, kernels.planned["persistent"]
    assert traced.spec.name == "persistent_traced"
    assert "persistent_traced" not in kernels.planned  # compiled only on request
    assert traced.spec.digest() != plain.spec.digest()
    assert (traced.ctas, traced.spec.cooperative, traced.spec.shared_bytes) == (132, True, plain.spec.shared_bytes)


# --- the plot --------------------------------------------------------------------------------------------------------


def test_a_picture_of_all_kinds_and_of_the_layer_in_the_middle(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    _, trace = recorded()
    picture = tmp_path / "timeline.svg"
    draw_timeline(trace, "a title", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.svg"]
    drawn = picture.read_text()
    for text in ("a title", "gate_up x 3", "vocabulary x 1", "waiting for weights", "time since layer 1 began"):
        assert text in drawn  # matplotlib notes each text beside its outlines
    with pytest.raises(DestinationError, match="cannot be written"):
        draw_timeline(trace, "", tmp_path / "missing" / "timeline.svg")
