"""The script that tells what giving LLVM's pages back costs."""

import json
import sys
from pathlib import Path

import pytest
import release_cost
from child_processes import run
from cli_runner import environment
from tiny_models import tiny_geometry, write_checkpoint

from numba_atomflow import home

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")


def test_every_turn_measures_both_kinds(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_geometry())
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    command = [sys.executable, release_cost.__file__, str(path), "--prompt", "9", "--turns", "2", "--json"]
    measured = json.loads(run(command, env=environment(tmp_path), text=True, check=True).stdout)
    assert list(measured) == ["with", "without"]
    for turns in measured.values():
        assert len(turns) == 2
        assert all(len(turn) == 5 and min(turn.values()) > 0 for turn in turns)


def test_only_one_kind_gives_pages_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, tiny_geometry())
    calls: list[int] = []
    monkeypatch.setattr(release_cost.backend, "release_library_pages", lambda: calls.append(1))
    release_cost.measure(str(path), 9, release=True)
    assert len(calls) == 1  # after loading: a prompt of 9 tokens is no whole chunk
    release_cost.measure(str(path), 9, release=False)
    assert len(calls) == 1


def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["release_cost.py", "--turns", "0"])
    with pytest.raises(SystemExit):
        release_cost.main()
    assert "--turns" in capsys.readouterr().err
