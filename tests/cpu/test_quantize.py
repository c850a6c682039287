"""Calibrated quantization: smaller errors in every projection, exact folding, resumption after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_processes import finish
from closeness import relative_l2
from numpy.typing import NDArray
from tiny_models import SMALLEST_VOCABULARY, names_in, random_weights, tiny_geometry, tiny_tokenizer, write_hf_folder

from numba_atomflow import Engine
from numba_atomflow import validate as validator
from numba_atomflow.convert import convert
from numba_atomflow.errors import DestinationError, OptionError, SourceError, TextError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups
from numba_atomflow.quantize import MethodName, awq, gptq
from numba_atomflow.quantize.calibration import SEQUENCES, documentation_strings, read_calibration
from numba_atomflow.quantize.forward import LayerForward
from numba_atomflow.quantize.inputs import Inputs, output_energy
from numba_atomflow.quantize.layer import PROJECTIONS, quantize_layer
from numba_atomflow.quantize.projection import Method, Quantized, Sharing, evaluate
from numba_atomflow.quantize.threads import cores_for_blas, cores_for_kernels
from numba_atomflow.text.codec import TextAssets

REPOSITORY = Path(__file__).parents[2]
WORDS = " ".join(f"the {name} of a thing is {name}ness;" for name in ("red", "round", "late", "soft", "loud")) + "\n"


def geometry(**changes: Any) -> ModelGeometry:
    return tiny_geometry(vocabulary=SMALLEST_VOCABULARY, **changes)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 8)
    return path


def layer_of(g: ModelGeometry, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The first layer of a random model, by parts."""
    weights = random_weights(g, seed)
    at = "model.layers.0."
    layer = {
        "attention_norm": weights[at + "input_layernorm.weight"],
        "ffn_norm": weights[at + "post_attention_layernorm.weight"],
        "qkv": np.concatenate([weights[f"{at}self_attn.{x}_proj.weight"] for x in "qkv"]),
        "o": weights[at + "self_attn.o_proj.weight"],
        "gate_up": np.concatenate([weights[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
        "down": weights[at + "mlp.down_proj.weight"],
    }
    if g.qkv_bias:
        layer["qkv_bias"] = np.concatenate([weights[f"{at}self_attn.{x}_proj.bias"] for x in "qkv"])
    return layer


def run(
    g: ModelGeometry, layer: dict[str, Any], stream: NDArray[np.float32]
) -> tuple[NDArray[np.float32], dict[str, Inputs]]:
    """One sequence through one layer: its output, and statistics of the inputs of each projection."""
    inputs = {"qkv": Inputs(g.hidden), "o": Inputs(g.q_dim), "gate_up": Inputs(g.hidden), "down": Inputs(g.ffn)}
    out = stream.copy()
    with cores_for_blas():
        LayerForward(g, len(stream)).run(layer, out, inputs)
    for each in inputs.values():
        each.finish()
    return out, inputs


# --- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_layers_are_those_of_the_engine(tmp_path: Path, changes: dict[str, Any]) -> None:
    g = geometry(**changes)
    write_hf_folder(tmp_path / "hf", g)
    tokens = np.random.default_rng(0).integers(0, g.vocabulary, 70).tolist()
    with Engine.load(convert(tmp_path / "hf", tmp_path / "model"), backend="cpu", threads=1) as engine:
        truth = validator.record(engine.backend, g, tokens, 0)
        checkpoint = engine.checkpoint
        for i in range(g.layers):
            layer: dict[str, Any] = {name: checkpoint.matrix(f"layer.{i}.{name}") for name in PROJECTIONS}
            prefix = f"layer.{i}."
            vectors = (n for n in checkpoint.names() if n.startswith(prefix) and n.endswith(("_norm", "_bias")))
            layer |= {name.removeprefix(prefix): checkpoint.array(name) for name in vectors}
            before = truth.tensors["embedding" if i == 0 else f"layer.{i - 1}.output"]
            out, inputs = run(g, layer, before)
            assert relative_l2(out, truth.tensors[f"layer.{i}.output"]) < 1e-5
            ffn = truth.tensors[f"layer.{i}.ffn"].astype(np.float64)
            np.testing.assert_allclose(inputs["down"].gram, ffn.T @ ffn / 70, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(inputs["down"].magnitude, np.abs(ffn).mean(axis=0), rtol=1e-3, atol=1e-6)


def test_the_error_is_that_of_outputs(rng: np.random.Generator) -> None:
    x, error = rng.standard_normal((50, 200), np.float32), rng.standard_normal((1500, 200), np.float32)
    inputs = Inputs(200)
    inputs.add(x[:20].copy())
    inputs.add(x[20:].copy())
    inputs.finish()
    expected = np.square(x.astype(np.float64) @ error.T.astype(np.float64)).sum() / 50
    assert output_energy(error, inputs.gram) == pytest.approx(expected, rel=1e-4)


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [awq.quantize, gptq.quantize])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 4}, {"hidden": 100, "ffn": 129}])
def test_every_projection_has_a_smaller_error_than_rtn(method: Method, changes: dict[str, Any]) -> None:
    g = geometry(**changes)
    layer, stream = layer_of(g), np.random.default_rng(1).standard_normal((200, g.hidden), np.float32)
    stream[:, 3] *= 20  # a channel with large activations
    inputs = run(g, layer, stream)[1]
    with cores_for_kernels():
        result = quantize_layer(g, layer, inputs, method)
    assert layer.keys() == {"attention_norm", "ffn_norm"}  # projections were let go of
    for name, (rounded, kept) in result.errors.items():
        assert 0 < kept < 0.95 * rounded, name


def test_the_recorded_errors_are_those_of_the_result() -> None:
    g = geometry()
    layer, stream = layer_of(g), np.random.default_rng(1).standard_normal((100, g.hidden), np.float32)
    inputs = run(g, layer, stream)[1]
    weights = layer["down"]
    with cores_for_kernels():
        result = quantize_layer(g, layer, inputs, gptq.quantize)
    kept = dequantize_groups(result.tensors["down.weight"], result.tensors["down.scale"])
    energy = output_energy(weights, inputs["down"].gram)
    assert result.errors["down"][1] ** 2 == pytest.approx(output_energy(weights - kept, inputs["down"].gram) / energy)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"heads": 6, "kv_heads": 2}, {"kv_heads": 4}])
def test_folding_channel_scales_changes_nothing(changes: dict[str, Any]) -> None:
    """Scaled weights with folded scales give the same outputs as the unscaled weights."""
    g = geometry(**changes)
    layer, rng = layer_of(g), np.random.default_rng(2)
    stream = rng.standard_normal((64, g.hidden), np.float32)
    unfolded = {name: part for name, part in layer.items() if part.ndim == 1}
    order = iter(PROJECTIONS)

    def scaled(weights: NDArray[np.float32], inputs: Inputs, sharing: Sharing) -> Quantized:
        channels = sharing.mean(np.exp(rng.uniform(-1, 1, weights.shape[1])).astype(np.float32))
        codes, scales = quantize_groups(weights * channels)
        unfolded[next(order)] = dequantize_groups(codes, scales) / channels
        return evaluate(weights * channels, inputs.gram, codes, scales, channels)

    inputs = run(g, layer, stream)[1]
    with cores_for_kernels():
        tensors = quantize_layer(g, layer, inputs, scaled).tensors
    folded = {name: dequantize_groups(tensors[f"{name}.weight"], tensors[f"{name}.scale"]) for name in PROJECTIONS}
    folded |= {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    assert relative_l2(folded["attention_norm"], unfolded["attention_norm"]) > 0.1  # something was folded
    assert relative_l2(run(g, folded, stream)[0], run(g, unfolded, stream)[0]) < 1e-5


def test_heads_with_the_same_head_of_v_share_scales() -> None:
    shared = Sharing(head_dim=2, ratio=2)
    means = shared.mean(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32))
    assert means.tolist() == [2, 3, 2, 3, 6, 7, 6, 7]
    assert shared.distinct(means).tolist() == [2, 3, 6, 7]
    assert Sharing().mean(np.arange(3, dtype=np.float32)).tolist() == [0, 1, 2]


def test_channel_scales_of_inactive_and_large_channels() -> None:
    scales = awq.channel_scales(np.array([0, 1, 1e6], np.float32), 1.0, Sharing())
    assert scales is not None
    assert np.isfinite(scales).all()
    assert scales.min() * scales.max() == pytest.approx(1, rel=1e-5)
    assert awq.channel_scales(np.zeros(3, np.float32), 1.0, Sharing()) is None
    assert awq.channel_scales(np.ones(3, np.float32), 0.0, Sharing()) is None


# --- a complete model ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["fp8", "fp16"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_calibrated_checkpoint(tmp_path: Path, text_file: Path, method: MethodName, head: Any, tied: bool) -> None:
    g = geometry(tied_embeddings=tied)
    weights = write_hf_folder(tmp_path / "hf", g)
    path = convert(tmp_path / "hf", tmp_path / "out" / "m", method=method, calibration=text_file, head=head)
    assert names_in(tmp_path / "out") == ["m"]
    with Engine.load(path, backend="cpu", threads=1) as engine:
        checkpoint = engine.checkpoint
        checkpoint.verify()
        assert checkpoint.head == head
        assert json.loads(checkpoint.metadata["quantiser"]) == {"method": method, "group_size": 128}
        record = json.loads(checkpoint.metadata["calibration"])
        assert (record["text"], record["tokens"] > 500) == ("text.txt", True)
        assert record["errors"].keys() == {f"layer.{i}.{name}" for i in range(2) for name in PROJECTIONS}
        assert all(pair["kept"] < pair["rtn"] for pair in record["errors"].values())
        embedding = weights["model.embed_tokens.weight"]
        np.testing.assert_allclose(checkpoint.matrix("embedding"), embedding, rtol=0.14, atol=0.02)
        tokens = engine.text.encode("The thing is red")
        logits = engine.feed(tokens, all_logits=True)
    with Engine.load(convert(tmp_path / "hf", tmp_path / "rtn"), backend="cpu", threads=1) as engine:
        assert relative_l2(logits, engine.feed(tokens, all_logits=True)) < 0.2  # another rounding of the same model


@pytest.mark.slow
def test_the_default_text_is_long_and_the_same_every_time() -> None:
    text = documentation_strings()
    assert len(text) > 200_000
    assert text == documentation_strings()
    assets = TextAssets(tiny_tokenizer().to_str().encode(), bos_token="<|bos|>", add_bos=True)
    tokens = read_calibration(None, assets, geometry()).tokens
    assert tokens.shape == (SEQUENCES, 512)
    assert (tokens[:, 0] == 0).all()  # the BOS
    assert (tokens[:, 1:] != 0).all()
    assert len({row.tobytes() for row in tokens}) == SEQUENCES


def test_a_context_of_one_token_with_a_bos_is_refused(text_file: Path) -> None:
    assets = TextAssets(tiny_tokenizer().to_str().encode(), bos_token="<|bos|>", add_bos=True)
    with pytest.raises(OptionError, match="1 positions, none of them left"):
        read_calibration(text_file, assets, tiny_geometry(max_positions=1))


def test_unusable_texts(tmp_path: Path, text_file: Path) -> None:
    write_hf_folder(tmp_path / "hf", geometry())

    def refused(error: type[Exception], fragment: str, **arguments: Any) -> None:
        with pytest.raises(error, match=fragment):
            convert(tmp_path / "hf", tmp_path / "out" / "model", warn=lambda _: None, **arguments)
        assert not (tmp_path / "out").exists()

    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    latin.write_bytes(b"caf\xe9")
    refused(OptionError, "short.txt has 9 tokens, too few", method="gptq", calibration=short)
    refused(TextError, "latin.txt is not UTF-8", method="gptq", calibration=latin)
    refused(TextError, "none.txt cannot be read", method="gptq", calibration=tmp_path / "none.txt")
    refused(OptionError, "The method rtn uses no calibration text", method="rtn", calibration=text_file)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    refused((SourceError, TextError), "tokenizer", method="gptq", calibration=text_file)  # type: ignore[arg-type]


# --- resumption after a kill -----------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from pathlib import Path
from numba_atomflow.convert import convert

def report(*step):
    print(*step, flush=True)
    time.sleep(0.03)

hf, out, text = map(Path, sys.argv[1:])
convert(hf, out, method="gptq", calibration=text, progress=report)
"""


def start(tmp_path: Path, out: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", SLOWLY, tmp_path / "hf", out, tmp_path / "text.txt"]
    return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


@pytest.mark.slow
def test_a_killed_quantization_resumes_with_identical_bytes(tmp_path: Path, text_file: Path) -> None:
    write_hf_folder(tmp_path / "hf", geometry(layers=5))
    whole, out = tmp_path / "whole", tmp_path / "out"
    child = start(tmp_path, whole)
    steps = finish(child)[0].splitlines()
    assert child.returncode == 0
    calibrating = [i for i, step in enumerate(steps) if "calibrating" in step]
    assert len(calibrating) == 5
    for _ in range(2):
        child = start(tmp_path, out)
        assert child.stdout is not None
        target = random.randrange(calibrating[0], len(steps) - 1)  # a random step, and a random moment in it
        for seen, step in enumerate(child.stdout):
            if seen >= target or "verifying" in step:
                break
        time.sleep(random.uniform(0, 0.03))
        child.kill()
        finish(child)
        assert child.returncode == -signal.SIGKILL
        assert not out.exists()
    child = start(tmp_path, out)
    again = finish(child)[0].splitlines()
    assert child.returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert names_in(tmp_path) == ["hf", "out", "text.txt", "whole"]
    assert len([step for step in again if "calibrating" in step]) < 5  # at least the first layer was kept


class StopHereError(Exception):
    """Interrupts a quantization."""


def stop_at(layer: int) -> Any:
    def report(what: str, *_: int) -> None:
        if what == f"layer {layer}: calibrating":
            raise StopHereError

    return report


@pytest.mark.slow
def test_finished_layers_are_used_for_the_same_job_only(tmp_path: Path, text_file: Path) -> None:
    write_hf_folder(tmp_path / "hf", geometry(layers=3))
    arguments: dict[str, Any] = {"method": "gptq", "calibration": text_file}
    expected = {}
    for method in ("gptq", "awq"):
        created = convert(tmp_path / "hf", tmp_path / method, **arguments | {"method": method})
        expected[method] = created.read_bytes()
    out, left = tmp_path / "out", tmp_path / "out.unfinished"
    with pytest.raises(StopHereError):
        convert(tmp_path / "hf", out, **arguments, progress=stop_at(2))
    assert names_in(left) == ["job.json", "layer.0.npz", "layer.1.npz", "lock", "stream.2.npy"]
    steps: list[str] = []
    convert(tmp_path / "hf", out, **arguments | {"method": "awq"}, progress=lambda what, *_: steps.append(what))
    assert "layer 0: calibrating" in steps
    assert (out.read_bytes(), left.exists()) == (expected["awq"], False)
    out.unlink()
    with pytest.raises(StopHereError):
        convert(tmp_path / "hf", out, **arguments, progress=stop_at(2))
    steps.clear()
    convert(tmp_path / "hf", out, **arguments, progress=lambda what, *_: steps.append(what))
    assert [step for step in steps if "calibrating" in step] == ["layer 2: calibrating"]
    assert out.read_bytes() == expected["gptq"]


@pytest.mark.parametrize("name", ["layer.0.npz", "stream.2.npy"])
def test_a_damaged_layer_is_named_and_a_missing_one_quantized_again(tmp_path: Path, text_file: Path, name: str) -> None:
    write_hf_folder(tmp_path / "hf", geometry(layers=3))
    out = tmp_path / "out"
    with pytest.raises(StopHereError):
        convert(tmp_path / "hf", out, method="gptq", calibration=text_file, progress=stop_at(2))
    damaged = tmp_path / "out.unfinished" / name
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(DestinationError, match=rf"{name} is damaged; delete .*out\.unfinished"):
        convert(tmp_path / "hf", out, method="gptq", calibration=text_file)
    damaged.unlink()
    convert(tmp_path / "hf", out, method="gptq", calibration=text_file)
    assert out.exists()


def test_a_second_process_is_refused(tmp_path: Path, text_file: Path) -> None:
    write_hf_folder(tmp_path / "hf", geometry())

    def report(what: str, *_: int) -> None:
        if what == "layer 1: calibrating":
            with pytest.raises(DestinationError, match="is being written by another process"):
                convert(tmp_path / "hf", tmp_path / "out", method="gptq", calibration=text_file)
            raise StopHereError

    with pytest.raises(StopHereError):
        convert(tmp_path / "hf", tmp_path / "out", method="gptq", calibration=text_file, progress=report)


# --- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from numba_atomflow.convert import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

convert(Path(sys.argv[1]), Path(sys.argv[2]), method="gptq", calibration=Path(sys.argv[3]))
print(peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_one_layer(tmp_path: Path, text_file: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 6):
        g = geometry(layers=layers, hidden=704, heads=11, kv_heads=11, ffn=704)  # many weights, and no wide input
        write_hf_folder(tmp_path / f"{layers}", g, dtype="BF16")
        sizes.append(2 * g.parameter_count())
        completed = subprocess.run(
            [sys.executable, "-c", PEAK, tmp_path / f"{layers}", tmp_path / f"{layers}.out", text_file],
            cwd=REPOSITORY,
            capture_output=True,
            check=True,
            text=True,
        )
        peaks.append(int(completed.stdout))
    assert peaks[1] < sizes[1] / 6 * 3 + 1e9
    assert peaks[1] - peaks[0] < 0.5 * (sizes[1] - sizes[0])  # in float32, the other layers take twice their size
