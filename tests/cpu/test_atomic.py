"""Atomic publication of files."""

import errno
import os
from pathlib import Path

import pytest

from numba_atomflow.files.atomic import publish_new, write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("replace", [True, False])
def test_a_new_file(tmp_path: Path, replace: bool) -> None:
    write_whole(tmp_path / "x", b"all", replace=replace)
    assert ((tmp_path / "x").read_bytes(), names_in(tmp_path)) == (b"all", ["x"])


def test_an_existing_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("x", "nowhere"):
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / name, b"new", replace=False)
    assert ((tmp_path / "x").read_bytes(), names_in(tmp_path)) == (b"precious", ["nowhere", "x"])


@pytest.mark.parametrize("replace", [True, False])
def test_a_full_disk_keeps_the_existing_file(tmp_path: Path, replace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if replace:
        (tmp_path / "x").write_bytes(b"precious")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "x", b"new", replace=replace)
    assert names_in(tmp_path) == (["x"] if replace else [])
    assert not replace or (tmp_path / "x").read_bytes() == b"precious"


@pytest.mark.parametrize("taken", [True, False])
def test_a_file_system_without_hard_links(tmp_path: Path, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "partial").write_bytes(b"new")
    if not taken:
        publish_new(tmp_path / "partial", tmp_path / "x")
        assert names_in(tmp_path) == ["x"]
        return
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        publish_new(tmp_path / "partial", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"precious"
