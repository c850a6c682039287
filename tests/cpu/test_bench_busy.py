"""Decode speed on a busy machine: competitors run while a side is measured, and end afterwards."""

import os
import sys

import bench_busy  # puts scripts/peers on the path
import pytest
from child_processes import run
from protocol import Task
from tiny_models import tiny_geometry

TASK = Task(tiny_geometry(), prompt_tokens=4, decode_tokens=2, repeats=1, device="cpu")


def test_competitors_end_with_the_block() -> None:
    def fail() -> None:
        assert all(process.poll() is None for process in processes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), bench_busy.competitors(2) as processes:
        fail()
    assert [process.poll() is not None for process in processes] == [True, True]


def test_competitors_end_with_a_process_that_is_killed() -> None:
    """They hold its standard output, so `run` returns after the last of them."""
    script = "import bench_busy, os\nwith bench_busy.competitors(2): os._exit(5)"
    done = run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, text=True)
    assert done.returncode == 5, done.stderr


def test_a_side_is_measured_with_its_environment() -> None:
    this, openmp, single = bench_busy.all_sides(2, None)
    assert (this.environment, openmp.environment) == ({}, {"NUMBA_THREADING_LAYER": "omp"})
    assert [side.threads for side in (this, openmp, single)] == [2, 2, 1]
    assert bench_busy.tokens_per_second(single, TASK) > 0


def test_the_median_of_rounds_by_competitors(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter(range(100))
    monkeypatch.setattr(bench_busy, "tokens_per_second", lambda side, task: float(next(speeds)))
    sides = bench_busy.all_sides(2, "llama-bench")
    assert (sides[-1].threads, sides[-1].options) == (2, {"binary": "llama-bench"})
    measured = bench_busy.measure(sides[:2], [0, 1], 3, TASK)
    assert measured == {
        0: {"this engine": 4.0, "numba's OpenMP pool": 5.0},
        1: {"this engine": 6.0, "numba's OpenMP pool": 7.0},
    }
    table = bench_busy.report(measured, "md")
    assert table.splitlines()[2:] == ["| 0 | 4.0 | 5.0 |", "| 1 | 6.0 | 7.0 |"]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["-r", "0"], "must be at least 1"), (["--geometry", "gpt-9"], "gpt-9")]
)
def test_bad_options(arguments: list[str], words: str) -> None:
    done = run([sys.executable, bench_busy.__file__, *arguments], text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
