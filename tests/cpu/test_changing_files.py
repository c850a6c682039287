"""Files that other programs change during use. Faults are triggered in separate processes."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runner import environment
from tiny_models import SMALLEST_VOCABULARY, random_weights, tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams, home
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import CheckpointError, GroundTruthError, SourceError
from numba_atomflow.files.stamp import FileStamp
from numba_atomflow.memory.mapped_file import MappedFile
from numba_atomflow.validate import check, open_ground_truth, record, save_ground_truth
from numba_atomflow.validate.ground_truth import FORMAT, FORMAT_VERSION

CHANGED = r"was changed by another program while it was in use"
BYTES = np.dtype(np.uint8)


def mapped(path: Path, *, private_copy: bool = False) -> MappedFile:
    return MappedFile(path, FileStamp.of(path.stat()), CheckpointError, private_copy=private_copy)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 256)
    os.utime(path, ns=(1, 1))  # so that every change shows, however soon it comes
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hf"
    geometry = tiny_geometry(vocabulary=SMALLEST_VOCABULARY)
    write_hf_folder(folder, geometry, weights=random_weights(geometry))
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path) -> Path:
    return convert(source, source.parent / "model.safetensors")


def test_rename_chmod_and_unlink_are_no_changes(file: Path) -> None:
    opened = mapped(file)
    before = opened.array(BYTES, (1000,), 0).copy()
    file.chmod(0o600)
    opened.check_unchanged()
    moved = file.with_name("moved")
    file.rename(moved)
    opened.check_unchanged()
    file.write_bytes(b"another")  # under the old name
    opened.check_unchanged()
    moved.unlink()
    opened.check_unchanged()
    np.testing.assert_array_equal(opened.array(BYTES, (1000,), 0), before)
    opened.close()


def test_a_write_is_detected(file: Path) -> None:
    opened = mapped(file)
    opened.array(BYTES, (10,), 0)
    with file.open("r+b") as other:
        other.write(b"x")
    for use in (opened.check_unchanged, lambda: opened.read(0, 10), opened.sha256):
        with pytest.raises(CheckpointError, match=CHANGED):
            use()
    opened.close()


def test_a_write_that_restores_mtime_is_detected(file: Path) -> None:
    opened = mapped(file)
    with file.open("r+b") as other:
        other.write(b"x")
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=CHANGED):
        opened.check_unchanged()
    opened.close()


def test_the_file_must_be_the_one_whose_header_was_read(file: Path) -> None:
    stamp = FileStamp.of(file.stat())
    file.with_name("new").write_bytes(b"another")
    file.with_name("new").replace(file)
    with pytest.raises(CheckpointError, match=CHANGED):
        MappedFile(file, stamp, CheckpointError)


@pytest.mark.parametrize("private_copy", [False, True])
def test_released_pages_are_read_again(file: Path, private_copy: bool) -> None:
    opened = mapped(file, private_copy=private_copy)
    opened.release(0, 100)  # before there is anything
    array = opened.array(BYTES, (65536,), 0)
    before = array.copy()
    opened.release(100, 65000)
    np.testing.assert_array_equal(array, before)
    opened.close()


def test_pages_that_are_locked_are_not_released(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked:
        def madvise(self, *_arguments: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    opened = mapped(file)
    with monkeypatch.context() as patch:
        patch.setattr(opened, "_map", Locked())
        opened.release(0, 65536)
    opened.close()


def test_a_private_copy_does_not_change(file: Path) -> None:
    opened = mapped(file, private_copy=True)
    array = opened.array(BYTES, (1000,), 0)
    before = array.copy()
    file.write_bytes(b"short")
    opened.check_unchanged()
    np.testing.assert_array_equal(array, before)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    opened.close()


def test_the_hash_is_that_of_the_open_file(file: Path) -> None:
    opened, data = mapped(file), file.read_bytes()
    file.unlink()
    assert opened.sha256() == hashlib.sha256(data).hexdigest()
    opened.close()


# --- faults ----------------------------------------------------------------------------------------------------------


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, *(str(argument) for argument in arguments)],
        env=environment(home.home()),
        capture_output=True,
        text=True,
        check=False,
    )


_FAULTS = """
import mmap, os, signal, sys, threading
from pathlib import Path
import numpy as np
from numba_atomflow.errors import CheckpointError
from numba_atomflow.files.stamp import FileStamp
from numba_atomflow.memory.mapped_file import MappedFile

folder, end = Path(sys.argv[1]), sys.argv[2]

def opened(name):
    path = folder / name
    path.write_bytes(b"x" * 100_000)
    return path, MappedFile(path, FileStamp.of(path.stat()), CheckpointError)

a, first = opened("a")
b, second = opened("b")
array, other = (file.array(np.dtype(np.uint8), (100_000,), 0) for file in (first, second))
os.truncate(a, 10_000)
sums = []
threads = [threading.Thread(target=lambda: sums.append(int(array.sum()))) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(sums) == 4 and max(sums) < 100_000 * ord("x"), sums
try:
    first.check_unchanged()
except CheckpointError as error:
    print(error)
assert other.sum() == 100_000 * ord("x")
second.check_unchanged()
del array, other
first.close(); second.close()
print("lives", flush=True)
if end == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
if end == "elsewhere":
    with (folder / "c").open("w+b") as file:
        file.truncate(8192)
        foreign = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        foreign[5000]
"""


def test_reading_after_the_end_does_not_end_the_process(tmp_path: Path) -> None:
    completed = run_python(_FAULTS, tmp_path, "")
    assert completed.returncode == 0, completed.stderr
    first, second = completed.stdout.splitlines()
    assert str(tmp_path / "a") in first
    assert second == "lives"
    assert completed.stderr == ""


@pytest.mark.parametrize("end", ["sent", "elsewhere"])
def test_other_faults_still_end_the_process(tmp_path: Path, end: str) -> None:
    completed = run_python(_FAULTS, tmp_path, end)
    assert completed.stdout.endswith("lives\n")
    assert completed.returncode == -7
    assert "Fatal Python error: Bus error" in completed.stderr  # the handler that was there before was called


_ENGINES = """
import os, shutil, sys
from pathlib import Path
from numba_atomflow import Engine, SamplingParams, cli
from numba_atomflow.errors import CheckpointError
model, folder = Path(sys.argv[1]), Path(sys.argv[2])

def cut(path): os.truncate(path, 4096)
def halve(path): os.truncate(path, path.stat().st_size // 2)
def copy_over(path): path.write_bytes(model.read_bytes()[::-1])
def spoil(path):
    with path.open("r+b") as file: file.seek(path.stat().st_size // 2); file.write(bytes([0x7F]) * 4096)
def replace(path): shutil.copy(model, path.with_name("new")).replace(path)

def fresh(name):
    path = folder / f"{name}.safetensors"
    shutil.copy(model, path)
    os.utime(path, ns=(1, 1))
    return path

params = SamplingParams(max_tokens=6, ignore_eos=True)
with Engine.load(model, "cpu", 32, 1) as engine:
    expected = engine.generate_tokens([5, 6], params).finish().token_ids
for change in (cut, halve, copy_over, spoil, replace, Path.unlink):
    path = fresh(change.__name__)
    with Engine.load(path, "cpu", 32, 1) as engine:
        reply = engine.generate_tokens([5, 6], params)
        next(reply)
        change(path)
        for use in (reply.finish, lambda: engine.feed([1]), lambda: engine.generate_tokens([5, 6], params).finish()):
            try:
                use()
                print(change.__name__, "goes on")
            except CheckpointError as error:
                print(change.__name__, error)
        if change in (replace, Path.unlink):
            assert reply.token_ids == expected, reply.token_ids

path, steps = fresh("cli"), []
from numba_atomflow.backends.cpu import CpuBackend
verify = CpuBackend.verify
def after_some(self, tokens):
    steps.append(1)
    if len(steps) == 2: cut(path)
    return verify(self, tokens)
CpuBackend.verify = after_some
arguments = ["--model", path, "--backend", "cpu", "--threads", "1", "--max-seq-len", "32", "--ignore-eos", "--quiet"]
print("exit code", cli.run(["generate", "ab", *map(str, arguments)]))
"""


def test_engines_refuse_a_changed_model_and_the_process_continues(checkpoint: Path, tmp_path: Path) -> None:
    completed = run_python(_ENGINES, checkpoint, tmp_path)
    assert completed.returncode == 0, completed.stderr
    *lines, last = completed.stdout.splitlines()
    for change in ("cut", "halve", "copy_over", "spoil"):
        messages = [line for line in lines if line.startswith(f"{change} ")]
        assert len(messages) == 3
        assert all(CHANGED in line and str(tmp_path / f"{change}.safetensors") in line for line in messages)
    for change in ("replace", "unlink"):
        assert lines.count(f"{change} goes on") == 3
    assert last.endswith("exit code 2")
    (error,) = completed.stderr.splitlines()
    assert error.startswith("error: ")
    assert CHANGED in error


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["cut", "written", "replaced", "gone"])
def test_a_source_that_changes_while_it_is_converted_is_refused(source: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"

    def progress(what: str, *_: int) -> None:
        if what != "layer.0.o":
            return
        if change == "cut":
            os.truncate(weights, weights.stat().st_size // 2)
        elif change == "written":
            os.utime(weights, ns=(1, 1))
        elif change == "replaced":
            shutil.copy(weights, folder / "new")
            (folder / "new").replace(weights)
        else:
            weights.unlink()

    with pytest.raises(SourceError, match=CHANGED):
        convert(folder, tmp_path / "made.safetensors", progress=progress)
    assert not list(tmp_path.glob("made*"))


def test_other_files_may_change(source: Path, tmp_path: Path) -> None:
    notes = source / "notes.txt"
    convert(source, tmp_path / "made.safetensors", progress=lambda what, *_: notes.write_text(what))
    notes.unlink()


def test_a_change_is_not_reported_as_damage(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(checkpoint, path)
    os.utime(path, ns=(1, 1))
    with Checkpoint.open(path) as opened:
        path.write_bytes(b"\x7f" * path.stat().st_size)
        with pytest.raises(CheckpointError, match=CHANGED):
            opened.verify()


def test_a_truncated_ground_truth_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "truth"
    with Engine.load(checkpoint, "cpu", 8, 1) as engine:
        created = record(engine.backend, engine.geometry, [5, 6], 2)
        described = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "reference": "dequantised",
            "text": "",
            "tokens": json.dumps(created.tokens),
            "prompt_tokens": "2",
            "geometry": json.dumps(engine.geometry.to_dict()),
            "versions": "{}",
            "checkpoint_sha256": engine.checkpoint.sha256(),
            "source": "{}",
        }
        save_ground_truth(replace(created, metadata=described), path)
        truth = open_ground_truth(path)
        check(engine.backend, truth)
        os.truncate(path, 4096)
        with pytest.raises(GroundTruthError, match=CHANGED):
            check(engine.backend, truth)


def test_a_private_copy_of_a_model_is_unaffected(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(checkpoint, path)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with Engine.load(path, "cpu", 32, 1, private_copy=True) as engine:
        expected = engine.generate_tokens([5, 6], params).finish().token_ids
        os.truncate(path, 0)
        engine.reset()
        assert engine.generate_tokens([5, 6], params).finish().token_ids == expected
