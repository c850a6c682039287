"""Conversion: values in the right rows, bounded memory, no files after a failure."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from child_processes import finish, run
from gguf import GGMLQuantizationType
from safetensors import safe_open
from tiny_models import (
    Weights,
    hf_config,
    names_in,
    random_weights,
    safetensors_bytes,
    tiny_geometry,
    tiny_tokenizer,
    write_gguf,
    write_hf_folder,
    write_json,
)

from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import DestinationError, SourceError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups_reference
from numba_atomflow.sources import base

REPOSITORY = Path(__file__).parents[2]


def part(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return dequantize_groups(checkpoint.array(name + ".weight"), checkpoint.array(name + ".scale"))


def check_values(path: Path, weights: Weights) -> None:
    """Every row of every part is in its place, quantized as in the reference."""
    with Checkpoint.open(path) as checkpoint:
        expected = {"embedding": ["model.embed_tokens"]}
        for i in range(checkpoint.geometry.layers):
            layer = f"model.layers.{i}."
            expected |= {
                f"layer.{i}.qkv": [layer + f"self_attn.{x}_proj" for x in "qkv"],
                f"layer.{i}.o": [layer + "self_attn.o_proj"],
                f"layer.{i}.gate_up": [layer + "mlp.gate_proj", layer + "mlp.up_proj"],
                f"layer.{i}.down": [layer + "mlp.down_proj"],
            }
            for norm, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
                np.testing.assert_array_equal(checkpoint.array(f"layer.{i}.{norm}"), weights[f"{layer}{theirs}.weight"])
            if checkpoint.geometry.qkv_bias:
                biases = [weights[f"{layer}self_attn.{x}_proj.bias"] for x in "qkv"]
                np.testing.assert_array_equal(checkpoint.array(f"layer.{i}.qkv_bias"), np.concatenate(biases))
            if checkpoint.geometry.qk_norm:
                for x in "qk":
                    norm = weights[f"{layer}self_attn.{x}_norm.weight"]
                    np.testing.assert_array_equal(checkpoint.array(f"layer.{i}.{x}_norm"), norm)
        np.testing.assert_array_equal(checkpoint.array("final_norm"), weights["model.norm.weight"])
        if not checkpoint.geometry.tied_embeddings:
            expected["vocabulary"] = ["lm_head"]
        for name, theirs in expected.items():
            codes, scales = quantize_groups_reference(np.concatenate([weights[x + ".weight"] for x in theirs]))
            np.testing.assert_array_equal(checkpoint.array(name + ".weight"), codes, err_msg=name)
            np.testing.assert_array_equal(checkpoint.array(name + ".scale"), scales, err_msg=name)


@pytest.mark.parametrize("slab", [1, 5000, 1 << 21])
@pytest.mark.parametrize("tied", [True, False])
def test_values_are_in_the_right_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int, tied: bool) -> None:
    monkeypatch.setattr(base, "SLAB_VALUES", slab)
    weights = write_hf_folder(tmp_path / "hf", tiny_geometry(tied_embeddings=tied), dtype="BF16", shards=2)
    created = convert(tmp_path / "hf", tmp_path / "out" / "model.safetensors")
    assert created == tmp_path / "out" / "model.safetensors"
    check_values(created, weights)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_float16_is_the_source_rounded_once(tmp_path: Path, tied: bool) -> None:
    weights = write_hf_folder(tmp_path / "hf", tiny_geometry(tied_embeddings=tied))
    plain = convert(tmp_path / "hf", tmp_path / "plain.safetensors")
    created = convert(tmp_path / "hf", tmp_path / "model.safetensors", head="fp16")
    head, theirs = ("embedding", "model.embed_tokens.weight") if tied else ("vocabulary", "lm_head.weight")
    with Checkpoint.open(created) as actual, Checkpoint.open(plain) as fp8:
        assert (actual.head, fp8.head) == ("fp16", "fp8")
        np.testing.assert_array_equal(actual.array(head + ".weight"), weights[theirs].astype(np.float16))
        assert set(fp8.names()) - set(actual.names()) == {head + ".scale"}
        for name in set(actual.names()) - {head + ".weight"}:
            np.testing.assert_array_equal(actual.array(name), fp8.array(name), err_msg=name)


@pytest.mark.parametrize("family", ["qkv_bias", "qk_norm"])
def test_parameters_of_other_families_are_in_the_right_rows(tmp_path: Path, family: str) -> None:
    weights = write_hf_folder(tmp_path / "hf", tiny_geometry(**{family: True}), dtype="BF16")
    check_values(convert(tmp_path / "hf", tmp_path / "out"), weights)


def test_a_gguf_and_a_folder_of_the_same_weights_become_the_same_tensors(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf", matrices=GGMLQuantizationType.Q8_0)
    write_hf_folder(tmp_path / "hf", weights=weights)
    from_gguf = convert(tmp_path / "model.gguf", tmp_path / "1.safetensors")
    from_folder = convert(tmp_path / "hf", tmp_path / "2.safetensors")
    check_values(from_gguf, weights)
    with Checkpoint.open(from_gguf) as one, Checkpoint.open(from_folder) as two:
        assert one.geometry == two.geometry
        for name in one.names():
            np.testing.assert_array_equal(one.array(name), two.array(name), err_msg=name)


def test_the_source_is_recorded_with_its_hashes(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", shards=2)
    with Checkpoint.open(convert(tmp_path / "hf", tmp_path / "out")) as checkpoint:
        record = json.loads(checkpoint.metadata["source"])
        assert json.loads(checkpoint.metadata["quantiser"]) == {"method": "rtn", "group_size": 128}
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / "hf").iterdir()}
    assert record == {"path": "hf", "kind": "hf", "sha256": hashes, "text_rules": base.TEXT_RULES}


def test_extreme_weights_survive(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    gate = weights["model.layers.0.mlp.gate_proj.weight"]
    gate[0], gate[1], gate[2] = 0.0, 65504.0, 1e-45
    gate[3, ::2], gate[4] = -0.0, np.linspace(-1e-43, 1e-43, 192, dtype=np.float32)
    write_hf_folder(tmp_path / "hf", weights=weights)
    check_values(convert(tmp_path / "hf", tmp_path / "out"), weights)


def test_progress_goes_from_hashing_through_every_part_to_verifying(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    steps: list[tuple[str, int, int]] = []
    convert(tmp_path / "model.gguf", tmp_path / "out", progress=lambda *step: steps.append(step))
    names = [name for name, _, _ in steps]
    assert (names[0], names[1], names[-2], names[-1]) == ("hashing model.gguf", "embedding", "vocabulary", "verifying")
    completed = [completed for _, completed, _ in steps[1:]]
    assert completed == sorted(completed)
    assert all(0 <= completed <= total for _, completed, total in steps)
    assert steps[-1][1] > 0.9 * steps[-1][2]


def test_smollm2_opens_with_other_readers(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    with Checkpoint.open(smollm2_checkpoint) as checkpoint, safe_open(smollm2_checkpoint, "numpy") as file:
        checkpoint.verify()
        assert sorted(file.keys()) == sorted(checkpoint.names())
        source = json.loads(checkpoint.metadata["source"])
        assert source["sha256"] == {smollm2_gguf.name: hashlib.sha256(smollm2_gguf.read_bytes()).hexdigest()}
        np.testing.assert_array_equal(file.get_tensor("embedding.scale"), checkpoint.array("embedding.scale"))


# --- memory --------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import numpy as np
from numba_atomflow.convert import convert
from numba_atomflow.ops.fp8 import quantize_groups

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

quantize_groups(np.ones((8, 256), np.float32))  # memory of the compiler is not counted
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak() - before)
"""


def peak_growth(source: Path, destination: Path) -> int:
    """Bytes by which the largest resident size of a process grows when it converts."""
    command = [sys.executable, "-c", PEAK, source, destination]
    completed = run(command, cwd=REPOSITORY, text=True, check=True)
    return int(completed.stdout)


def write_sparse_folder(folder: Path, geometry: ModelGeometry, shards: int) -> int:
    """A folder with zero weights in sparse files; returns the bytes of all of them."""
    folder.mkdir()
    write_json(folder / "config.json", hf_config(geometry))
    shapes, files = list(geometry.parameters().items()), dict[str, str]()
    for shard in range(shards):
        path = folder / f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for name, shape in shapes[shard::shards]:
            begin, end = end, end + 4 * math.prod(shape)
            header[name], files[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}, path.name
        start = safetensors_bytes(header)
        path.write_bytes(start)
        os.truncate(path, len(start) + end)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    geometry = tiny_geometry(layers=8, hidden=1024, heads=16, kv_heads=16, ffn=2048, vocabulary=8192)
    folder = tmp_path / "hf"
    size = write_sparse_folder(folder, geometry, shards=5)
    assert size > 370e6
    assert peak_growth(folder, tmp_path / "out") < 25e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_smollm2_stays_below_its_source(smollm2_gguf: Path, tmp_path: Path) -> None:
    assert peak_growth(smollm2_gguf, tmp_path / "out") < smollm2_gguf.stat().st_size


# --- no files remain -----------------------------------------------------------------------------------------------


def test_existing_destinations(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    with pytest.raises(DestinationError, match=r"out\.safetensors exists"):
        convert(tmp_path / "model.gguf", out)
    assert out.read_text() == "precious"
    convert(tmp_path / "model.gguf", out, overwrite=True)
    with Checkpoint.open(out) as checkpoint:
        checkpoint.verify()


def test_a_dangling_link_is_an_existing_destination(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    out = tmp_path / "out.safetensors"
    out.symlink_to(tmp_path / "nowhere")
    steps: list[str] = []
    with pytest.raises(DestinationError, match=r"out\.safetensors exists"):
        convert(tmp_path / "model.gguf", out, progress=lambda step, *_: steps.append(step))
    assert not steps  # known before any work


def test_of_two_simultaneous_conversions_the_later_fails(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf")
    write_gguf(tmp_path / "other.gguf", seed=1)
    out = tmp_path / "out" / "model.safetensors"

    def progress(step: str, *_: int) -> None:
        if step == "layer.1.qkv":
            convert(tmp_path / "model.gguf", out)

    with pytest.raises(DestinationError, match=r"model\.safetensors exists"):
        convert(tmp_path / "other.gguf", out, progress=progress)
    assert names_in(out.parent) == [out.name]
    check_values(out, weights)


@pytest.mark.parametrize("overwrite", [True, False])
def test_destinations_that_are_not_files(tmp_path: Path, overwrite: bool) -> None:
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(DestinationError, match="is a folder"):
        convert(tmp_path / "model.gguf", tmp_path, overwrite=overwrite)
    with pytest.raises(DestinationError, match="is a device or a pipe"):
        convert(tmp_path / "model.gguf", Path("/dev/null"), overwrite=overwrite)
    with pytest.raises(DestinationError, match="File name too long"):
        convert(tmp_path / "model.gguf", tmp_path / ("x" * 300), overwrite=overwrite)


def test_the_source_is_never_the_destination(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    before = weights.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(weights)
    for destination in (weights, link):
        with pytest.raises(DestinationError, match="is part of the source"):
            convert(tmp_path / "hf", destination, overwrite=True)
    assert weights.read_bytes() == before


def test_a_bad_source_leaves_no_file(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    weights["lm_head.weight"][-1, -1] = np.nan
    write_hf_folder(tmp_path / "hf", weights=weights)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match=r"lm_head\.weight of .*model\.safetensors holds a NaN"):
        convert(tmp_path / "hf", out / "model.safetensors")
    with pytest.raises(SourceError, match="does not exist"):
        convert(tmp_path / "none", out / "model.safetensors")
    assert names_in(out) == []


ENDS_IN_A_PANIC = json.dumps(
    json.loads(tiny_tokenizer().to_str()) | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}
)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("chat_template.jinja", "{% for m in messages %}", "chat template is not valid Jinja"),
        ("chat_template.jinja", "{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "chat template is not valid Jinja"),
        ("chat_template.jinja", "{{ 'a' * 10**9 }}", "chat template cannot be rendered (MemoryError"),
        ("tokenizer.json", ENDS_IN_A_PANIC, "tokenizer cannot encode the text (chunk size"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<nowhere>"}', "lacks '<nowhere>'"),
    ],
)
def test_unusable_text_is_refused_before_any_work(tmp_path: Path, name: str, content: str, fault: str) -> None:
    write_hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    steps: list[str] = []
    with pytest.raises(SourceError, match=r"/hf\b.* (cannot be (converted|used): The model|asks for a BOS)") as caught:
        convert(tmp_path / "hf", tmp_path / "out" / "model", progress=lambda step, *_: steps.append(step))
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (steps, names_in(tmp_path)) == ([], ["hf"])


def test_a_chat_template_that_refuses_a_question_is_reported(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", tiny_geometry(layers=1))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    warnings: list[str] = []
    convert(tmp_path / "hf", tmp_path / "out", warn=warnings.append)
    (warning,) = warnings
    assert warning == (
        f"{tmp_path / 'hf'} has a chat template with which `chat` may fail, as one question does: The model's chat "
        "template refuses this conversation: no system message."
    )


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "hf", tiny_geometry(vocabulary=64))
    with pytest.raises(SourceError, match=r"its tokenizer uses the token .* for plain text, but the model has 64"):
        convert(tmp_path / "hf", tmp_path / "out", warn=lambda _: None)
    assert names_in(tmp_path) == ["hf"]


def test_a_checkpoint_is_not_a_source(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "out.safetensors")
    with pytest.raises(SourceError, match=r"out\.safetensors holds only weights"):
        convert(tmp_path / "out.safetensors", tmp_path / "again.safetensors")


SLOW = """
import sys, time
from pathlib import Path
from numba_atomflow.convert import convert

def progress(step, done, total):
    if step == "layer.1.qkv":
        print("half way", flush=True)
        time.sleep(60)

convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=progress)
"""


def half_way(source: Path, destination: Path) -> subprocess.Popen[str]:
    """A process that is blocked during a conversion."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, source, destination],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half way\n"
    return process


def test_kill_during_a_conversion(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "model.gguf")
    out = tmp_path / "out" / "model.safetensors"
    with half_way(tmp_path / "model.gguf", out) as process:
        (partial,) = out.parent.iterdir()
        assert partial.name.startswith(f"model.safetensors.partial-{process.pid}-")

        # While it lives, another conversion to the same place leaves its file alone.
        convert(tmp_path / "model.gguf", out)
        assert names_in(out.parent) == [out.name, partial.name]
        out.unlink()

        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert names_in(out.parent) == [partial.name]  # nothing under the final name
    convert(tmp_path / "model.gguf", out)
    assert names_in(out.parent) == [out.name]
    check_values(out, weights)


def test_ctrl_c_during_a_conversion(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    out = tmp_path / "out" / "model.safetensors"
    with half_way(tmp_path / "model.gguf", out) as process:
        process.send_signal(signal.SIGINT)
        _, errors = finish(process)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert names_in(out.parent) == []
