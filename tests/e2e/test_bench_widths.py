"""scripts/bench_widths.py: the time of CPU steps of several tokens."""

import json
from pathlib import Path

import bench_widths
import pytest


def test_times_by_position_and_width(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tiny_checkpoint), "--widths", "2,3", "--positions", "0,9", "-r", "1", "--threads", "1"]
    assert bench_widths.main([*given, "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert {at: set(times) for at, times in seconds.items()} == {at: {"1", "2", "3"} for at in ("0", "9")}
    assert all(time > 0 for times in seconds.values() for time in times.values())
    assert bench_widths.main(given) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[-3].split()[0] == "position"
    assert bench_widths.main(["no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
