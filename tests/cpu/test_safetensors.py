"""Malicious headers are refused with one short sentence, in time linear in their size."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import safetensors_bytes

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.checkpoint.safetensors import read_tensor_file
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.errors import AtomFlowError, CheckpointError, SourceError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.text.codec import TextAssets

SECONDS = 5  # of CPU time; what was mended took more than 30


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def shape_text(shape: str) -> bytes:
    return b'{"a":{"dtype":"F32","shape":%s,"data_offsets":[0,8]}}' % shape.encode()


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "1,000 sizes of 4,001 digits": (lambda: shape_text("[" + ",".join(["9" * 4001] * 1000) + "]"), "4001 digits"),
    "60 sizes of 1,000 digits": (lambda: shape_text("[" + ",".join(["9" * 1000] * 60) + "]"), "impossible shape"),
    "60 large sizes": (lambda: {"a": entry(shape=[2**63] * 60)}, "but its data_offsets are [0, 8]"),
    "a million dimensions": (lambda: {"a": entry(shape=[1] * 1_000_000 + [2])}, "impossible shape"),
    "a million data_offsets": (lambda: {"a": entry(data_offsets=[0] * 1_000_000)}, "impossible shape"),
    "60,000 duplicates": (lambda: b"{" + b",".join(b'"a%d":1,"a%d":1' % (i, i) for i in range(60_000)) + b"}", "twice"),
    "a name of a megabyte": (lambda: {"n" * 1_000_000: entry(dtype="F5")}, "nnn..."),
    "a dtype of a megabyte": (lambda: {"a": entry(dtype="F" * 1_000_000)}, "dtype 'FFF"),
    "a name of escape codes": (lambda: {"\x1b[2J\n": entry(shape=[3])}, r"\x1b[2J\n"),
    "an integer of 5,000 digits": (lambda: shape_text("[" + "9" * 5000 + "]"), "5000 digits"),
    "metadata of a list": (lambda: {"__metadata__": [1] * 100_000}, "must map names to strings"),
    "a header of 5 MB": (lambda: {"__metadata__": {"a": " " * 5_000_000}}, "more than the 4194304"),
    "a negative size": (lambda: {"a": entry(shape=[-2])}, "impossible shape"),
    "a true size": (lambda: {"a": entry(shape=[True, 2])}, "impossible shape"),
    "sizes in a string": (lambda: {"a": entry(shape="22")}, "impossible shape"),
    "an infinite size": (lambda: shape_text("[Infinity]"), "impossible shape [inf]"),
    "no name at all": (lambda: {"": entry(shape=[3])}, "Tensor  of"),
}


def refused(path: Path, error: type[AtomFlowError], read: Callable[[Path], object]) -> str:
    started = time.process_time()
    with pytest.raises(error) as caught:
        read(path)
    assert time.process_time() - started < SECONDS
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300
    return message


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malicious_header_is_refused(tmp_path: Path, case: str) -> None:
    header, fragment = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header(), bytes(8)))
    assert fragment in refused(path, SourceError, lambda path: read_tensor_file(path, SourceError))


def test_thousands_of_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {f"t{i}": entry(shape=[0, i], data_offsets=[0, 0]) for i in range(20_000)}
    path.write_bytes(safetensors_bytes(header | {"last": entry(shape=[])}, bytes(4)))
    with pytest.raises(SourceError, match=r"last of .* is F32 \[\], 4 bytes, but"):
        read_tensor_file(path, SourceError)
    path.write_bytes(safetensors_bytes(header, b""))
    started = time.process_time()
    assert len(read_tensor_file(path, SourceError).entries) == 20_000
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("layers", [3_000, 25_000, 10**18])
def test_a_checkpoint_with_too_many_layers(tmp_path: Path, layers: int) -> None:
    geometry = ModelGeometry(1, 64, 1, 1, 64, 64, 8, 16)
    metadata = {
        "format": "numba-atomflow",
        "format_version": "1",
        "geometry": json.dumps(geometry.to_dict() | {"layers": layers}),
        "quantiser": "{}",
        "source": "{}",
        "text": "{}",
    }
    entries = {f"t{i}": entry(shape=[0], data_offsets=[0, 0]) for i in range(30_000)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": metadata} | entries))
    fragment = "lacks the tensor embedding.weight" if layers == 3_000 else "layers, but has 30000 tensors"
    assert fragment in refused(path, CheckpointError, Checkpoint.open)


def test_a_pipe_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)  # opening it would wait for a writer
    assert "is not a file" in refused(path, SourceError, lambda path: read_tensor_file(path, SourceError))


@pytest.mark.parametrize("key", ["format_version", "geometry", "quantiser", "source", "text"])
@pytest.mark.parametrize(
    "value", ["x" * 1_000_000, "[" * 100_000, "9" * 100_000, '{"%s": 1}' % ("n" * 100_000), "\x1b"]
)
def test_invalid_records_of_a_checkpoint(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "model.safetensors"
    writer = CheckpointWriter(path, ModelGeometry(1, 64, 1, 1, 64, 64, 8, 16), TextAssets(), {}, {})
    header = json.loads(writer._header[8:])
    header["__metadata__"][key] = value
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    path.write_bytes(safetensors_bytes(text, bytes(writer.total_bytes - len(writer._header))))
    if value.startswith("{") and key in ("quantiser", "source"):  # records that are not used
        Checkpoint.open(path).close()
        return
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < len(str(path)) + 300
