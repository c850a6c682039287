"""GGUF files that are split into parts: as the whole file, and damage."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import add_gguf_field, names_in, tiny_geometry, write_gguf

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import SourceError
from numba_atomflow.sources import open_source
from numba_atomflow.sources.gguf_parts import part_names


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """Three parts of a model; the first holds only metadata."""
    write_gguf(tmp_path / "tiny.gguf", tiny_geometry(layers=1), tokenizer=True, tensors_per_part=6)
    assert names_in(tmp_path) == [f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    return sorted(tmp_path.iterdir())


def rewrite(path: Path, fields: dict[str, Any], tensors: tuple[str, ...] = ()) -> None:
    """Replace a part by one with these fields, and with tensors of these names."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add_gguf_field(writer, key, value)
    for name in tensors:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(path)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_parts_are_the_whole_model_whichever_is_given(tmp_path: Path, parts: list[Path], given: int) -> None:
    write_gguf(tmp_path / "whole.gguf", tiny_geometry(layers=1), tokenizer=True)
    split, whole = open_source(parts[given]), open_source(tmp_path / "whole.gguf")
    assert split.files == tuple(parts)
    assert split.path == parts[0]
    assert split.geometry == whole.geometry
    assert split.text.tokenizer_json == whole.text.tokenizer_json
    for name in whole.names():
        assert np.array_equal(split.read(name), whole.read(name))


def test_a_checkpoint_of_the_parts_records_all_of_them(tmp_path: Path, parts: list[Path]) -> None:
    with Checkpoint.open(convert(parts[1], tmp_path / "out.safetensors")) as checkpoint:
        source = json.loads(checkpoint.metadata["source"])
    assert source["path"] == parts[0].name
    assert list(source["sha256"]) == [part.name for part in parts]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a-00002-of-00002.gguf", ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]),
        ("a-00003-of-00002.gguf", ["a-00003-of-00002.gguf"]),
        ("a-00000-of-00002.gguf", ["a-00000-of-00002.gguf"]),
        ("a-1-of-2.gguf", ["a-1-of-2.gguf"]),
        ("a.gguf", ["a.gguf"]),
    ],
)
def test_names_of_parts(name: str, names: list[str]) -> None:
    assert part_names(name) == names


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[2].unlink()
    refused(parts[0], f"{parts[2]} is missing, part 3 of the 3 of a model; get all parts.")


def test_a_renamed_part_is_refused(parts: list[Path]) -> None:
    parts[0].rename(parts[0].parent / "tiny.gguf")
    refused(parts[0].parent / "tiny.gguf", "one of 3 parts of a model", "does not end in -00001-of-00003.gguf")


def test_a_damaged_part_is_named(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-100])
    refused(parts[0], f"{parts[1]} is truncated")


@pytest.mark.parametrize(
    ("fields", "tensors", "fragment"),
    [
        ({"split.no": 2, "split.count": 3}, (), "has split.no 2, but by its name it is 1"),
        ({"split.no": 1, "split.count": 4}, (), "has split.count 4, but by its name it is 3"),
        ({"split.no": 1}, (), "lacks the metadata field split.count"),
        ({"split.no": 1, "split.count": "3"}, (), "unusable value in the metadata field split.count"),
        ({"split.no": 1, "split.count": 3}, (), "says that all parts have 12 tensors, but they have 6"),
        ({"split.no": 1, "split.count": 3}, ("output_norm.weight",), "holds the tensor output_norm.weight, which tiny"),
    ],
)
def test_parts_of_different_models_are_refused(
    parts: list[Path], fields: dict[str, Any], tensors: tuple[str, ...], fragment: str
) -> None:
    rewrite(parts[1], fields, tensors)
    refused(parts[0], fragment)
