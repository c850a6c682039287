"""Two revisions of the engine against each other: export from git, the order of turns, and the ratio."""

import os
import subprocess
import sys
from pathlib import Path

import bench_against
import pytest
from bench_against import Side, SideError, Turn
from child_processes import run
from tiny_models import tiny_geometry

ROOT = Path(__file__).resolve().parents[2]
TASK = {
    "prompt_tokens": 8,
    "decode_tokens": 4,
    "backend": "cpu",
    "threads": 1,
    "geometry": tiny_geometry().to_dict(),
}


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    git(folder, "init", "--quiet")
    (folder / "package" / "a.py").write_text("old")
    (folder / "link").symlink_to("package")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    git(folder, "tag", "one")
    (folder / "package" / "a.py").write_text("new")
    git(folder, "commit", "--quiet", "-am", "two")
    return folder


def test_a_revision_is_exported_and_the_repository_is_not_changed(repository: Path, tmp_path: Path) -> None:
    (repository / "package" / "a.py").write_text("edited")
    out = tmp_path / "out"
    short = bench_against.export("one", out, repository)
    assert len(short) >= 4
    assert (out / "link" / "a.py").read_text() == "old"
    assert (out / "link").is_symlink()
    assert (repository / "package" / "a.py").read_text() == "edited"


@pytest.mark.parametrize("revision", ["nonsense", "--all", "one:package"])
def test_what_is_no_revision_is_refused(repository: Path, tmp_path: Path, revision: str) -> None:
    with pytest.raises(SideError, match=f"git knows no revision '{revision}'"):
        bench_against.export(revision, tmp_path / "out", repository)


def test_a_checkout_is_used_where_it_is(repository: Path, tmp_path: Path) -> None:
    (repository / "numba_atomflow").mkdir()
    git(repository, "commit", "--quiet", "--allow-empty", "-m", "three")
    name, tree = bench_against.find_tree(str(repository), tmp_path / "out")
    assert tree == repository.resolve()
    assert len(name) >= 7
    assert not (tmp_path / "out").exists()


class Recorded:
    """A side whose turns are known."""

    def __init__(self, name: str, log: list[str], *tpots: float) -> None:
        self.name, self.log, self.tpots = name, log, list(tpots)

    def turn(self) -> Turn:
        self.log.append(self.name)
        tpot = self.tpots.pop(0)
        return Turn(2 * tpot, tpot)


def test_sides_alternate_and_the_first_turn_is_thrown_away() -> None:
    log: list[str] = []
    before, now = Recorded("a", log, 9.0, 2.0, 4.0, 6.0), Recorded("b", log, 1.0, 1.0, 2.0, 2.0)
    pairs = bench_against.take_turns(before, now, 3)
    assert log == ["a", "b", "b", "a", "a", "b", "b", "a"]
    record = bench_against.record_of(pairs, ("old", "new"), {})
    assert record["tpot"]["before"]["median"] == 4.0
    assert record["tpot"]["now"]["median"] == 2.0
    ratio = record["tpot"]["ratio"]
    assert (ratio["median"], ratio["count"]) == (2.0, 3)
    assert ratio["high"] == pytest.approx(2.8)  # of pairs 2, 2 and 3
    lines = bench_against.report(record).splitlines()
    assert lines[0].split()[:2] == ["old", "new"]
    assert "2.000 (2.000-2.800)" in lines[1]


@pytest.mark.slow
def test_a_slower_tree_is_found(tmp_path: Path) -> None:
    """A copy of this tree whose decode steps sleep."""
    slow = tmp_path / "slow"
    slow.mkdir()
    for name in ("numba_atomflow", "ops", "memory", "validate"):
        (slow / name).symlink_to(ROOT / name)
    (slow / "sitecustomize.py").write_text(
        "import time\n"
        "from numba_atomflow.backends.cpu import CpuBackend\n"
        "decode = CpuBackend.decode\n"
        "CpuBackend.decode = lambda self: (time.sleep(0.02), decode(self))[1]\n"
    )
    with Side("slow", slow, TASK) as before, Side("now", ROOT, TASK) as now:
        pairs = bench_against.take_turns(before, now, 2)
    for then, today in pairs:
        assert then.tpot > 0.02
        assert then.tpot > today.tpot


def test_a_side_that_cannot_run_says_why() -> None:
    with pytest.raises(SideError, match="now cannot run this: threads is 9999"):
        Side("now", ROOT, TASK | {"threads": 9999})


def test_a_side_is_gone_when_its_turns_are_over() -> None:
    with Side("now", ROOT, TASK) as side:
        process = side._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.parametrize(("arguments", "culprit"), [(["HEAD", "-r", "0"], "-r"), (["HEAD", "/no/model"], "/no/model")])
def test_a_wrong_command_line_is_refused(arguments: list[str], culprit: str) -> None:
    done = run(
        [sys.executable, bench_against.__file__, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert done.returncode == 2
    assert culprit in done.stderr.splitlines()[-1]
