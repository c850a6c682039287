"""The FP8 checkpoint: other readers, validation, and atomic writes."""

import errno
import fcntl
import io
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_models import names_in, safetensors_bytes, tiny_geometry, tiny_tokenizer

from numba_atomflow.checkpoint.format import Checkpoint, tensor_layout
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.errors import CheckpointError, DestinationError
from numba_atomflow.model.formats import HeadFormat
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.rope_scaling import Llama3Scaling
from numba_atomflow.text.codec import TextAssets

TEXT = TextAssets(
    tiny_tokenizer().to_str().encode(), "{{ messages }}", "<|bos|>", "<|eos|>", eos_ids=(1, 2), add_bos=True
)
SOURCE = {"path": "model.gguf", "kind": "gguf", "sha256": {"model.gguf": "00" * 32}}
SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)


def writer_for(path: Path, text: TextAssets = TEXT, head: HeadFormat = "fp8", **changes: Any) -> CheckpointWriter:
    quantiser = {"method": "rtn", "group_size": 128}
    return CheckpointWriter(path, tiny_geometry(**changes), text, quantiser, SOURCE, head=head)


def contents(seed: int = 0, head: HeadFormat = "fp8", **changes: Any) -> dict[str, np.ndarray]:
    """Random codes without NaN, positive scales, norms, float16 weights."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, (dtype, shape) in tensor_layout(tiny_geometry(**changes), head).items():
        if dtype == "F16":
            tensors[name] = rng.standard_normal(shape).astype(np.float16)
        elif dtype == "F32":
            tensors[name] = rng.uniform(0.5, 2.0, shape).astype(np.float32)
        else:
            codes = rng.integers(0, 256, shape, np.uint8)
            tensors[name] = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)
    return tensors


def write(path: Path, tensors: dict[str, np.ndarray] | None = None, text: TextAssets = TEXT, **changes: Any) -> Path:
    with writer_for(path, text, **changes) as writer:
        for name, values in (tensors or contents(**changes)).items():
            writer.write(name, values)
    return path


# --- layout --------------------------------------------------------------------------------------------------------


def test_layout_of_a_layer() -> None:
    layout = tensor_layout(tiny_geometry(layers=1))
    assert layout == {
        "embedding.weight": ("F8_E4M3", (288, 192)),
        "embedding.scale": ("F32", (288, 2)),
        "layer.0.attention_norm": ("F32", (192,)),
        "layer.0.qkv.weight": ("F8_E4M3", (512, 192)),
        "layer.0.qkv.scale": ("F32", (512, 2)),
        "layer.0.o.weight": ("F8_E4M3", (192, 256)),
        "layer.0.o.scale": ("F32", (192, 2)),
        "layer.0.ffn_norm": ("F32", (192,)),
        "layer.0.gate_up.weight": ("F8_E4M3", (640, 192)),
        "layer.0.gate_up.scale": ("F32", (640, 2)),
        "layer.0.down.weight": ("F8_E4M3", (192, 320)),
        "layer.0.down.scale": ("F32", (192, 3)),
        "final_norm": ("F32", (192,)),
        "vocabulary.weight": ("F8_E4M3", (288, 192)),
        "vocabulary.scale": ("F32", (288, 2)),
    }
    assert not [name for name in tensor_layout(tiny_geometry(tied_embeddings=True)) if name.startswith("vocabulary")]
    qwen2, qwen3 = (tensor_layout(tiny_geometry(layers=1, **{key: True})) for key in ("qkv_bias", "qk_norm"))
    assert dict(qwen2.items() - layout.items()) == {"layer.0.qkv_bias": ("F32", (512,))}
    assert dict(qwen3.items() - layout.items()) == {f"layer.0.{x}_norm": ("F32", (64,)) for x in "qk"}


def test_layout_with_a_head_in_float16() -> None:
    untied, tied = tiny_geometry(layers=1), tiny_geometry(layers=1, tied_embeddings=True)
    expected = tensor_layout(untied) | {"vocabulary.weight": ("F16", (288, 192))}
    del expected["vocabulary.scale"]
    assert tensor_layout(untied, "fp16") == expected
    expected = tensor_layout(tied) | {"embedding.weight": ("F16", (288, 192))}
    del expected["embedding.scale"]
    assert tensor_layout(tied, "fp16") == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True, "rope_scaling": SCALING},
        {"hidden": 200, "ffn": 99},
        {"head": "fp16"},
        {"head": "fp16", "tied_embeddings": True, "hidden": 99, "vocabulary": 17},
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors = contents(**changes)
    path = write(tmp_path / "model.safetensors", tensors, **changes)
    assert names_in(tmp_path) == ["model.safetensors"]
    head = changes.pop("head", "fp8")
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()
        assert checkpoint.head == head
        assert checkpoint.geometry == tiny_geometry(**changes)
        assert checkpoint.text == TEXT
        assert json.loads(checkpoint.metadata["source"]) == SOURCE
        assert json.loads(checkpoint.metadata["quantiser"]) == {"method": "rtn", "group_size": 128}
        assert sorted(checkpoint.names()) == sorted([*tensors, "tokenizer.json"])
        assert checkpoint.payload_bytes == sum(values.nbytes for values in tensors.values())
        for name, values in tensors.items():
            read = checkpoint.array(name)
            assert (read.dtype, read.flags.writeable, read.flags.aligned) == (values.dtype, False, True)
            np.testing.assert_array_equal(read, values, err_msg=name)


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", text=TextAssets())
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.text == TextAssets()
        assert "tokenizer.json" not in checkpoint.names()


def test_rows_may_be_split_and_tensors_in_any_order(tmp_path: Path) -> None:
    tensors = contents()
    with writer_for(tmp_path / "pieces.safetensors") as writer:
        for name in reversed(tensors):
            for rows in np.array_split(tensors[name], 5):
                writer.write(name, rows)
    whole = write(tmp_path / "whole.safetensors", tensors)
    assert (tmp_path / "pieces.safetensors").read_bytes() == whole.read_bytes()


def test_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = contents()
    path = write(tmp_path / "model.safetensors", tensors)
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "numba-atomflow"
        assert sorted(file.keys()) == sorted([*tensors, "tokenizer.json"])
        np.testing.assert_array_equal(file.get_tensor("layer.0.down.scale"), tensors["layer.0.down.scale"])
        assert file.get_tensor("tokenizer.json").tobytes() == TEXT.tokenizer_json
        assert file.get_slice("layer.0.down.weight").get_dtype() == "F8_E4M3"


def test_torch_sees_the_same_fp8_values(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from numba_atomflow.ops.fp8 import e4m3_to_float

    path = write(tmp_path / "model.safetensors")
    loaded = load_file(path)
    with Checkpoint.open(path) as checkpoint:
        name = "layer.1.gate_up.weight"
        assert loaded[name].dtype == torch.float8_e4m3fn
        np.testing.assert_array_equal(loaded[name].to(torch.float32).numpy(), e4m3_to_float(checkpoint.array(name)))


@pytest.mark.parametrize("head", ["fp8", "fp16"])
def test_weights_start_at_a_multiple_of_128_after_all_floats(tmp_path: Path, head: HeadFormat) -> None:
    data = write(tmp_path / "model.safetensors", head=head).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    del header["__metadata__"]
    order = [record["dtype"] for record in sorted(header.values(), key=lambda record: record["data_offsets"][0])]
    assert order == sorted(order, key=["F32", "F16", "F8_E4M3", "U8"].index)
    for dtype in {"F16", "F8_E4M3"} & set(order):
        assert (start + min(r["data_offsets"][0] for r in header.values() if r["dtype"] == dtype)) % 128 == 0
    assert start % 4 == 0


@pytest.mark.parametrize("head", ["fp8", "fp16"])
def test_matrix_dequantizes(tmp_path: Path, head: HeadFormat) -> None:
    tensors = contents(head=head)
    with Checkpoint.open(write(tmp_path / "model.safetensors", tensors, head=head)) as checkpoint:
        embedding, vocabulary = checkpoint.matrix("embedding"), checkpoint.matrix("vocabulary")
    assert (embedding.dtype, vocabulary.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(embedding, dequantize_groups(tensors["embedding.weight"], tensors["embedding.scale"]))
    if head == "fp16":
        np.testing.assert_array_equal(vocabulary, tensors["vocabulary.weight"].astype(np.float32))
    else:
        np.testing.assert_array_equal(
            vocabulary, dequantize_groups(tensors["vocabulary.weight"], tensors["vocabulary.scale"])
        )


def test_arrays_outlive_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path / "model.safetensors"))
    norm = checkpoint.array("final_norm")
    checkpoint.close()
    assert norm.sum() > 0


# --- errors --------------------------------------------------------------------------------------------------------


def refused(path: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.safetensors", "none.safetensors does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "gguf").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "gguf", "is a GGUF file; convert it first")
    (tmp_path / "text").write_bytes(b"Once upon a time" + bytes(100))
    refused(tmp_path / "text", "is not a safetensors file")
    (tmp_path / "other").write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}}))
    refused(tmp_path / "other", "is not a numba-atomflow checkpoint", "convert")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(tmp_path / "other", "other cannot be read (Permission denied)")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 3000, -1])
def test_truncation(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "model.safetensors")


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 128)
    path.write_bytes(safetensors_bytes(text, data[8 + length :]))


def metadata(**changes: str) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["__metadata__"].update(changes)


def changed_geometry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return metadata(geometry=json.dumps(tiny_geometry().to_dict() | changes))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (metadata(format_version="2"), "format version 2, this program reads 1"),
        (lambda header: header["__metadata__"].pop("format_version"), "format version None"),
        (metadata(geometry="{"), "geometry record"),
        (metadata(geometry="[]"), "geometry record"),
        (lambda header: header["__metadata__"].pop("geometry"), "geometry record"),
        (changed_geometry(head_dim=63), "head_dim 63"),
        (changed_geometry(colour="red"), "cannot be read"),
        (changed_geometry(layers=10**12), "1000000000000 layers"),
        (changed_geometry(layers=3), "lacks the tensor layer.2.attention_norm"),
        (changed_geometry(layers=1), "unknown tensor layer.1."),
        (changed_geometry(ffn=256), "layer.0.gate_up.weight"),
        (changed_geometry(tied_embeddings=True), "unknown tensor vocabulary."),
        (changed_geometry(layers=2.0), "layers is 2.0"),
        (changed_geometry(rope_theta="10000"), "rope_theta is '10000'"),
        (changed_geometry(norm_eps=-1.0), "norm_eps is -1.0"),
        (metadata(quantiser="[1]"), "quantiser record"),
        (metadata(quantiser="rtn"), "quantiser record"),
        (metadata(source="[]"), "source record"),
        (metadata(source="null"), "source record"),
        (lambda header: header["__metadata__"].pop("source"), "source record"),
        (metadata(text='{"chat_template": 5}'), "text record"),
        (metadata(text="nonsense"), "text record"),
        (metadata(text='{"eos_ids": 5}'), "text record"),
        (lambda header: header["layer.0.qkv.weight"].update(dtype="F8_E5M2"), "layer.0.qkv.weight"),
        (lambda header: header["layer.0.qkv.weight"].update(shape=[192, 512]), "layer.0.qkv.weight"),
        (lambda header: header.update(extra=header.pop("final_norm")), "lacks the tensor final_norm"),
        (lambda header: header["layer.0.o.weight"].update(dtype="F16", shape=[192, 128]), "not F8_E4M3 [192, 256]"),
        (lambda header: header["vocabulary.weight"].update(dtype="F16", shape=[288, 96]), "not F16 [288, 192]"),
        (lambda header: header["embedding.weight"].update(dtype="F16", shape=[288, 96]), "not F8_E4M3 [288, 192]"),
        (lambda header: header["tokenizer.json"].update(dtype="I8"), "unknown tensor tokenizer.json"),
    ],
)
def test_inconsistent_headers(tmp_path: Path, change: Callable[[dict[str, Any]], Any], fragment: str) -> None:
    path = write(tmp_path / "model.safetensors")
    edit_header(path, change)
    refused(path, fragment)


def test_a_file_of_another_writer_with_misaligned_floats(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(safetensors_bytes(data[8 : 8 + length] + b" ", data[8 + length :]))
    refused(path, "misaligned")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding.weight", 0x7F),
        ("layer.1.down.weight", 0xFF),
        ("layer.0.o.scale", 0.0),
        ("layer.0.o.scale", -1.0),
        ("layer.0.o.scale", np.nan),
        ("vocabulary.scale", np.inf),
        ("final_norm", np.nan),
        ("layer.1.ffn_norm", -np.inf),
    ],
)
def test_verify_detects_invalid_values(tmp_path: Path, name: str, value: float) -> None:
    path = write(tmp_path / "model.safetensors")
    with Checkpoint.open(path) as checkpoint:
        view = checkpoint.array(name)
        base = checkpoint.array("embedding.scale")
        data = bytearray(path.read_bytes())
        at = data.index(base.tobytes()) + view.ctypes.data - base.ctypes.data
        del view, base
    item = np.array(value, np.uint8 if name.endswith("weight") else np.float32).tobytes()
    data[at + 4 * len(item) : at + 5 * len(item)] = item
    path.write_bytes(data)
    with Checkpoint.open(path) as checkpoint, pytest.raises(CheckpointError, match=f"Tensor {name} of .* is damaged"):
        checkpoint.verify()


def test_verify_detects_an_infinity_in_float16(tmp_path: Path) -> None:
    tensors = contents(head="fp16")
    tensors["vocabulary.weight"][7, 3] = np.inf
    with pytest.raises(CheckpointError, match=r"Tensor vocabulary\.weight of .* is damaged"):
        write(tmp_path / "model.safetensors", tensors, head="fp16")


def test_damaged_values_are_not_published(tmp_path: Path) -> None:
    tensors = contents()
    tensors["layer.0.o.scale"][3, 1] = np.inf
    with pytest.raises(CheckpointError, match=r"layer\.0\.o\.scale"):
        write(tmp_path / "model.safetensors", tensors)
    assert names_in(tmp_path) == []


# --- atomic writes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((192, 2), np.float64),
        np.zeros((192, 3), np.float32),
        np.zeros((193, 2), np.float32),
        np.zeros(384, np.float32),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"layer\.0\.o\.scale"), writer_for(tmp_path / "model.safetensors") as writer:
        writer.write("layer.0.o.scale", wrong)
    assert names_in(tmp_path) == []


def test_every_tensor_must_be_complete(tmp_path: Path) -> None:
    tensors = contents()
    twice = {"final_norm": np.concatenate([tensors["final_norm"]] * 2)}
    with pytest.raises(ValueError, match="final_norm"):
        write(tmp_path / "model.safetensors", tensors | twice)
    last = tensors.pop("vocabulary.scale")
    with pytest.raises(ValueError, match=r"vocabulary\.scale and 0 other"):
        write(tmp_path / "model.safetensors", tensors | {"vocabulary.scale": last[:-1]})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, RuntimeError])
def test_an_exception_removes_the_partial_file(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), writer_for(tmp_path / "model.safetensors") as writer:  # noqa: PT012
        writer.write("final_norm", contents()["final_norm"])
        assert len(names_in(tmp_path)) == 1
        raise error
    assert names_in(tmp_path) == []


def test_an_exception_keeps_an_existing_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), writer_for(path):
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["model.safetensors"]


class FailingDisk(io.FileIO):
    """A file on a disk with 10,000 bytes of free space."""

    def __init__(self, path: Path, code: int) -> None:
        super().__init__(path, "x+b")
        self.free, self.code = 10_000, code

    def write(self, data: Any) -> int:
        taken = bytes(data)[: self.free]
        if not taken:
            raise OSError(self.code, os.strerror(self.code))
        self.free -= len(taken)
        return super().write(taken)


@pytest.mark.parametrize(
    ("code", "fragment"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "Input/output error")],
)
def test_disk_full_during_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fragment: str) -> None:
    plain = Path.open

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return FailingDisk(path, code) if mode == "xb" else plain(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DestinationError, match=rf"model\.safetensors could not be written.*{fragment}"):
        write(tmp_path / "model.safetensors")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(DestinationError, match="the disk is full"):
        write(tmp_path / "model.safetensors")
    assert names_in(tmp_path) == []


def test_free_space_is_checked_before_the_first_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100_000))
    with pytest.raises(DestinationError, match=r"needs 1 MB, but only 0 MB are free"):
        write(tmp_path / "model.safetensors")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_read_only_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    plain = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if call == "open" and args[:1] == ("rb",):
            return plain(path, *args, **options)
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, call, denied)
    with pytest.raises(DestinationError, match=rf"could not be written: {tmp_path}.* is read-only for you"):
        write(tmp_path / "model.safetensors")


def test_a_destination_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "model.safetensors", tmp_path / "file" / "deeper" / "model.safetensors"):
        with pytest.raises(DestinationError, match=r"file.* is in the way"):
            write(path)


def test_missing_folders_are_created(tmp_path: Path) -> None:
    assert write(tmp_path / "a" / "b" / "model.safetensors").is_file()


def test_two_writers_in_one_process_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = contents()
    with writer_for(path) as first:
        write(path, contents(seed=1))
        for name, values in tensors.items():
            first.write(name, values)
    assert names_in(tmp_path) == [path.name]
    with Checkpoint.open(path) as checkpoint:
        for name, values in tensors.items():
            np.testing.assert_array_equal(checkpoint.array(name), values, err_msg=name)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_created_meanwhile_is_not_replaced_without_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def unsupported(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # what Linux says of FAT

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "model.safetensors"
    writer = CheckpointWriter(path, tiny_geometry(), TEXT, {"method": "rtn"}, SOURCE, overwrite=False)
    with pytest.raises(DestinationError, match=r"model\.safetensors exists; .*--overwrite"), writer:  # noqa: PT012
        for name, values in contents().items():
            writer.write(name, values)
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_published_on_file_systems_with_and_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    path = tmp_path / "model.safetensors"
    with CheckpointWriter(path, tiny_geometry(), TEXT, {"method": "rtn"}, SOURCE, overwrite=False) as writer:
        for name, values in contents().items():
            writer.write(name, values)
    assert names_in(tmp_path) == [path.name]
    with Checkpoint.open(path) as checkpoint:
        checkpoint.verify()


def test_a_partial_file_removed_before_its_lock_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, removed = fcntl.flock, []

    def flock(file: Any, operation: int) -> None:
        if not removed and operation == fcntl.LOCK_EX:  # another process gets in between
            removed.extend(tmp_path.glob("*.partial-*"))
            removed[0].unlink()
        plain(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    path = write(tmp_path / "model.safetensors")
    assert len(removed) == 1
    assert names_in(tmp_path) == [path.name]


def test_only_partial_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    dead, own_number = (
        tmp_path / "model.safetensors.partial-999999",
        tmp_path / f"model.safetensors.partial-{os.getpid()}",
    )
    other = tmp_path / "model2.safetensors.partial-999999"
    for left_behind in (dead, own_number, other):
        left_behind.write_bytes(b"half")
    write(path)
    assert names_in(tmp_path) == [path.name, other.name]
