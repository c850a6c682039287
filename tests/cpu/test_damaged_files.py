"""Damage to files that the program writes and reads back: ground truths and interrupted quantizations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import targets
from fuzzing.targets import CALIBRATION, FOLDER, GEOMETRY, MODEL, UNFINISHED
from tiny_models import safetensors_bytes, write_hf_folder

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import DestinationError, GroundTruthError
from numba_atomflow.quantize import resume
from numba_atomflow.quantize.layer import QuantizedLayer
from numba_atomflow.quantize.resume import ResumableJob
from numba_atomflow.validate.ground_truth import check_fits, open_ground_truth

# --- ground truths -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fixtures")
    write_hf_folder(folder / FOLDER, GEOMETRY)
    convert(folder / FOLDER, folder / MODEL)
    (folder / CALIBRATION).write_text("The quick brown fox jumps over the lazy dog, and away. " * 10)
    return folder


@pytest.fixture(scope="module")
def truth(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return targets._ground_truth(fixtures, tmp_path_factory.mktemp("truth"))


def with_metadata(data: bytes, **changes: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= changes
    return safetensors_bytes(header, data[8 + length :])


def test_a_valid_ground_truth_is_accepted(fixtures: Path, truth: bytes, tmp_path: Path) -> None:
    path = tmp_path / "truth.safetensors"
    path.write_bytes(truth)
    with Checkpoint.open(fixtures / MODEL) as checkpoint:
        check_fits(open_ground_truth(path), path, checkpoint)


@pytest.mark.parametrize(
    "tokens",
    [
        "[Infinity]",
        "[NaN]",
        "[1.0]",
        "[true]",
        '["1"]',
        "[null]",
        "[-1]",
        "[264]",
        "5",
        '"12"',
        "{}",
        "[]",
        "[",
        "[" + "9" * 400 + "]",
        "[" + "9" * 5000 + "]",
        "[" * 100000,
        "[[1]]",
    ],
    ids=lambda text: text[:12],
)
def test_invalid_tokens(truth: bytes, tmp_path: Path, tokens: str) -> None:
    path = tmp_path / "truth.safetensors"
    path.write_bytes(with_metadata(truth, tokens=tokens))
    with pytest.raises(GroundTruthError) as refused:
        open_ground_truth(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("prompt_tokens", text)
            for text in ("0", "-1", "1.0", "true", "1e400", "9" * 5000, "NaN", "", " ", "1_0", "8")
        ),
        *(("geometry", text) for text in ("", "[]", "5", "null", "[" * 100_000, '{"layers": ' + "9" * 5000 + "}")),
        ("geometry", json.dumps(GEOMETRY.to_dict() | {"layers": 10**9})),
        ("geometry", json.dumps(GEOMETRY.to_dict() | {"hidden": True})),
        ("geometry", json.dumps(GEOMETRY.to_dict() | {"n" * 100_000: 1})),
        ("reference", "\x1b[2J" * 1000),
        ("format_version", "x" * 100_000),
        ("checkpoint_sha256", "\x1b[2J\n"),
        ("text", "another text" * 10_000),
    ],
    ids=lambda text: text[:12],
)
def test_invalid_descriptions(fixtures: Path, truth: bytes, tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "truth.safetensors"
    path.write_bytes(with_metadata(truth, **{key: value}))
    with Checkpoint.open(fixtures / MODEL) as checkpoint, pytest.raises(GroundTruthError) as refused:
        check_fits(open_ground_truth(path), path, checkpoint)
    message = str(refused.value)
    assert message.isprintable()
    assert len(message.replace(str(path), "").replace(str(fixtures), "")) < 400


# --- interrupted quantizations --------------------------------------------------------------------------------------

JOB = {"method": "gptq", "source": {"name": "a"}}
LAYOUT: resume.Layout = {"down.weight": (np.dtype(np.uint8), (2, 3)), "ffn_norm": (np.dtype(np.float32), (3,))}
TENSORS = {"down.weight": np.arange(6, dtype=np.uint8).reshape(2, 3), "ffn_norm": np.ones(3, np.float32)}
STREAM = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def opened(tmp_path: Path, job: dict[str, Any] = JOB) -> ResumableJob:
    return ResumableJob(tmp_path / UNFINISHED, job)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a job with two finished layers."""
    with opened(tmp_path) as job:
        for i in range(2):
            job.save(i, QuantizedLayer(TENSORS, {"down": (0.25, 0.125)}), STREAM + i)
    return tmp_path / (UNFINISHED + ".unfinished")


def read_all(tmp_path: Path) -> list[QuantizedLayer]:
    with opened(tmp_path) as job:
        finished = job.finished()
        if finished:
            np.testing.assert_array_equal(job.stream(finished, STREAM.shape), STREAM + finished - 1)
        return [job.layer(i, LAYOUT) for i in range(finished)]


def test_saved_layers_are_read_back(folder: Path, tmp_path: Path) -> None:
    layers = read_all(tmp_path)
    assert [layer.errors for layer in layers] == [{"down": (0.25, 0.125)}] * 2
    for name, tensor in layers[1].tensors.items():
        np.testing.assert_array_equal(tensor, TENSORS[name])


@pytest.mark.parametrize("name", ["layer.0.npz", "layer.1.npz", "stream.2.npy"])
def test_every_changed_bit_is_detected(folder: Path, tmp_path: Path, name: str) -> None:
    path = folder / name
    intact = path.read_bytes()
    for place in range(0, len(intact), 13):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 1]) + intact[place + 1 :])
        with pytest.raises(DestinationError, match=rf"{name} is damaged; delete .*\.unfinished and start again\."):
            read_all(tmp_path)
    path.write_bytes(intact)
    assert len(read_all(tmp_path)) == 2


def valid_but_other(path: Path) -> None:
    np.savez(path, **{name: tensor + 1 for name, tensor in TENSORS.items()})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "layer.1.npz").write_bytes((folder / "layer.0.npz").read_bytes()),
        lambda folder: valid_but_other(folder / "layer.0.npz"),
        lambda folder: np.save(folder / "stream.2.npy", STREAM.astype(np.float64)),
        lambda folder: np.save(folder / "stream.2.npy", STREAM + 1),
        lambda folder: (folder / "stream.2.npy").write_bytes(b""),
        lambda folder: (folder / "layer.0.npz").write_bytes(b"\x93NUMPY\x01\x00\xff\xff"),
        lambda folder: ((folder / "stream.2.npy").unlink(), (folder / "stream.2.npy").mkdir()),
    ],
    ids=["swapped", "altered", "dtype", "stream altered", "empty", "header", "folder"],
)
def test_other_files_than_those_saved(folder: Path, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(DestinationError, match=r"is damaged; delete .*\.unfinished and start again\."):
        read_all(tmp_path)


@pytest.mark.parametrize("layout", [{}, LAYOUT | {"ffn_norm": (np.dtype(np.float32), (4,))}])
def test_a_layer_of_another_layout_is_damaged(folder: Path, tmp_path: Path, layout: resume.Layout) -> None:
    with opened(tmp_path) as job:
        with pytest.raises(DestinationError, match=r"layer\.0\.npz is damaged"):
            job.layer(0, layout)
        with pytest.raises(DestinationError, match=r"stream\.2\.npy is damaged"):
            job.stream(2, (2, 3, 5))


def test_other_files_are_ignored_and_kept(folder: Path, tmp_path: Path) -> None:
    strays = ["stream.x.npy", "stream..npy", "stream.99.npy", "layer.7.npz", "stream.\u0662.npy", "notes.txt"]
    for name in strays:
        (folder / name).write_bytes(b"\xff")
    assert len(read_all(tmp_path)) == 2
    with opened(tmp_path) as job:
        job.remove()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[]", b"null", b"[" * 100_000, b'"gptq"'])
def test_an_invalid_job_restarts(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "job.json").write_bytes(content)
    assert read_all(tmp_path) == []
    assert json.loads((folder / "job.json").read_text()) == JOB


def test_a_different_job_restarts(folder: Path, tmp_path: Path) -> None:
    with opened(tmp_path, {"method": "awq"}) as job:
        assert job.finished() == 0
    assert sorted(path.name for path in folder.iterdir()) == ["job.json", "lock"]


def test_a_missing_layer_is_quantized_again(folder: Path, tmp_path: Path) -> None:
    (folder / "layer.1.npz").unlink()
    assert read_all(tmp_path) == []  # there is no stream before layer 1
