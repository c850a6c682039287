"""The script that tells where memory goes."""

import sys
from pathlib import Path

import memory_phases
import pytest
from child_processes import run
from cli_runner import environment
from memory_phases import Memory
from tiny_models import tiny_geometry, write_checkpoint

from numba_atomflow import home

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")


def test_the_kernels_figures_are_read(tmp_path: Path) -> None:
    (tmp_path / "smaps_rollup").write_text(
        "00400000-7fff ---p 00000000 00:00 0   [rollup]\nRss:   300 kB\nPss:   200 kB\nAnonymous:   100 kB\n"
    )
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   400 kB\nVmRSS:\t   300 kB\n")
    assert Memory.now(tmp_path) == Memory(resident=307200, private=102400, proportional=204800, peak=409600)
    assert Memory.now().peak >= Memory.now().private > 1e6


def test_every_phase_has_a_row(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_geometry())
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    command = [sys.executable, memory_phases.__file__, str(path), "--prompt", "9", "--threads", "1", "--format", "md"]
    lines = run(command, env=environment(tmp_path), text=True, check=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in rows] == list(memory_phases.phases("", 9, None))
    resident = [int(row[1]) for row in rows]
    assert resident[0] < resident[3]  # a tiny model is smaller than LLVM, which leaves the process when it is loaded
    peaks = [int(row[-1]) for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]
    assert all(abs(int(all_) - int(private) - int(files)) <= 1 for _, all_, private, files, *_ in rows)


@pytest.mark.parametrize(
    ("arguments", "culprit"), [(["--prompt", "0"], "--prompt"), (["nothing.safetensors"], "nothing.safetensors")]
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["memory_phases.py", *arguments])
    with pytest.raises(SystemExit):
        memory_phases.main()
    assert culprit in capsys.readouterr().err
