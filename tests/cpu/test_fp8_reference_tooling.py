"""FP8 models written by the reference tools convert without loss.

Each test makes a small model, has the tool quantize and save it, and compares what this program reads from the folder
and makes of it with what the tool itself expands the folder to (in float32).
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import Weights, hf_config, tiny_geometry, write_json

from numba_atomflow import Engine
from numba_atomflow.checkpoint.format import Checkpoint, fusion
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.fp8 import dequantize_groups, quantize_groups_reference
from numba_atomflow.sources import open_source
from numba_atomflow.validate import check, make_ground_truth

torch = pytest.importorskip("torch", reason="torch writes FP8 checkpoints: pip install '.[validate]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers writes FP8 checkpoints: pip install '.[validate]'"
)

SMALL = tiny_geometry()  # hidden 192 and FFN 320: the last blocks of 128 are short
EVEN = tiny_geometry(hidden=256, ffn=384)  # whole blocks, which is all that transformers writes
IGNORED = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Ignore warnings of third-party tools, which would be errors here."""
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_model(geometry: ModelGeometry, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**hf_config(geometry))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def expanded_by_transformers(folder: Path, **options: Any) -> Weights:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def check_lossless(folder: Path, expected: Weights, kept: str) -> None:
    """FP8 weights are identical in source and checkpoint; others are rounded."""
    source = open_source(folder)
    assert source.fp8_scheme == kept
    stored_in_fp8 = 0
    for name in source.names():
        np.testing.assert_array_equal(source.read(name), expected[name], err_msg=name)
        stored_in_fp8 += source.read_fp8(name) is not None
    assert stored_in_fp8 == 7 * 2 - 1  # the projections of two layers without the ignored one
    assert source.read_fp8(f"{IGNORED}.weight") is None
    with Checkpoint.open(convert(folder, folder.parent / "converted.safetensors")) as checkpoint:
        assert json.loads(checkpoint.metadata["quantiser"]) == {"kept": kept, "method": "rtn", "group_size": 128}
        for part, names in fusion(checkpoint.geometry).items():
            if f"{part}.weight" in checkpoint.names():
                got = dequantize_groups(checkpoint.array(f"{part}.weight"), checkpoint.array(f"{part}.scale"))
                target = [rounded(expected[n]) if source.read_fp8(n) is None else expected[n] for n in names]
                np.testing.assert_array_equal(got, np.concatenate(target), err_msg=part)


def rounded(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return dequantize_groups(*quantize_groups_reference(weights))


# --- compressed-tensors ----------------------------------------------------------------------------------------------


def write_compressed_tensors(folder: Path, geometry: ModelGeometry, strategy: str, dtype: Any, **options: Any) -> None:
    """As llm-compressor after calibration: scales from the largest weight, compress, save."""
    pytest.importorskip(
        "compressed_tensors", reason="compressed-tensors writes its own format: pip install '.[formats]'"
    )
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

    weights = QuantizationArgs(num_bits=8, type="float", strategy=strategy, **options)
    inputs = QuantizationArgs(num_bits=8, type="float", strategy="tensor")  # static: input scales are saved as well
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    model = random_model(geometry, dtype)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["re:.*lm_head", IGNORED])
    apply_quantization_config(model, config)
    for module in model.modules():
        if is_module_quantized(module):
            tiles = tiles_of(module.weight.data, strategy, options)
            scales, _ = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), weights)
            module.weight_scale.data = scales.reshape(module.weight_scale.shape)
            module.input_scale.data.fill_(0.5)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def tiles_of(weight: Any, strategy: str, options: dict[str, Any]) -> Any:
    """A weight as [tiles, rows, tiles, columns], padded with zeros."""
    n, k = weight.shape
    rows, columns = {
        "tensor": (n, k),
        "channel": (1, k),
        "block": options.get("block_structure"),
        "group": (1, options.get("group_size")),
    }[strategy]
    padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


@pytest.mark.parametrize(
    ("geometry", "strategy", "options", "kept"),
    [
        (SMALL, "tensor", {}, "per tensor"),
        (SMALL, "channel", {}, "per channel"),
        (SMALL, "block", {"block_structure": [128, 128]}, "in blocks of 128 x 128"),
        (EVEN, "block", {"block_structure": [128, 128]}, "in blocks of 128 x 128"),
        (EVEN, "block", {"block_structure": [64, 256]}, "in blocks of 64 x 256"),
        (EVEN, "group", {"group_size": 128}, "in groups of 128"),
        (replace(EVEN, qk_norm=True), "channel", {}, "per channel"),
        (replace(EVEN, qkv_bias=True), "tensor", {}, "per tensor"),
    ],
)
def test_compressed_tensors(
    tmp_path: Path, geometry: ModelGeometry, strategy: str, options: dict[str, Any], kept: str
) -> None:
    folder = tmp_path / "hf"
    write_compressed_tensors(folder, geometry, strategy, torch.float32, **options)
    theirs = expanded_by_transformers(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    check_lossless(folder, theirs, f"compressed-tensors {kept}")


def test_compressed_tensors_with_scales_in_bfloat16(tmp_path: Path) -> None:
    """Dequantization of the tool rounds to bfloat16; the format's definition does not."""
    folder = tmp_path / "hf"
    write_compressed_tensors(folder, SMALL, "channel", torch.bfloat16)
    expected = by_definition(folder, "weight_scale")
    theirs = expanded_by_transformers(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    for name, values in expected.items():
        np.testing.assert_allclose(values, theirs[name], rtol=2.0**-8, err_msg=name)
    check_lossless(folder, expected, "compressed-tensors per channel")


def by_definition(folder: Path, suffix: str) -> Weights:
    """code * scale in float32, for scales of a tensor or of rows."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {
        name: (tensor.float() * tensors.get(name.replace("weight", suffix), torch.tensor(1)).float()).numpy()
        for name, tensor in tensors.items()
        if not name.endswith("scale")
    }


# --- fbgemm_fp8 ------------------------------------------------------------------------------------------------------


def test_fbgemm_fp8(tmp_path: Path) -> None:
    """Modules and configuration of the format; its quantization kernel needs a GPU, so torch rounds the rows."""
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

    folder = tmp_path / "hf"
    model = random_model(SMALL)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", IGNORED):
            packed = FbgemmFp8Linear(module.in_features, module.out_features, module.bias is not None)
            scale = module.weight.data.abs().amax(dim=1, keepdim=True) / 448
            packed.weight.data, packed.weight_scale.data = (module.weight.data / scale).to(packed.weight.dtype), scale
            model.set_submodule(name, packed)
    model.config.quantization_config = transformers.FbgemmFp8Config(modules_to_not_convert=["lm_head", IGNORED])
    model.save_pretrained(folder)
    check_lossless(folder, by_definition(folder, "weight_scale"), "fbgemm_fp8 per channel")


# --- fp8 -------------------------------------------------------------------------------------------------------------


def write_fp8(folder: Path, geometry: ModelGeometry, **options: Any) -> None:
    """With the quantization operation of transformers, called directly: its loader requires a GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    ignored = ["lm_head", IGNORED]
    config = transformers.FineGrainedFP8Config(modules_to_not_convert=ignored, **options)
    model = random_model(geometry)
    quantize = Fp8Quantize(type("Quantizer", (), {"quantization_config": config})())
    tensors: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in ignored:
            tensors |= quantize.convert({f"{name}.weight": module.weight.data})
            if options.get("activation_scheme") == "static":
                tensors[f"{name}.activation_scale"] = torch.tensor(0.5)
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in tensors}
    model.save_pretrained(folder, state_dict=others | tensors)
    path = folder / "config.json"
    write_json(path, json.loads(path.read_text()) | {"quantization_config": config.to_dict()})


@pytest.mark.parametrize(
    ("geometry", "options", "kept"),
    [
        (EVEN, {}, "in blocks of 128 x 128"),
        (EVEN, {"scale_fmt": "ue8m0"}, "in blocks of 128 x 128"),
        (EVEN, {"weight_block_size": (64, 128)}, "in blocks of 64 x 128"),
        (SMALL, {"weight_block_size": None}, "per tensor"),
        (SMALL, {"weight_block_size": None, "activation_scheme": "static"}, "per tensor"),
        (replace(EVEN, qk_norm=True), {}, "in blocks of 128 x 128"),
        (replace(EVEN, qkv_bias=True), {}, "in blocks of 128 x 128"),
    ],
)
def test_fp8(tmp_path: Path, geometry: ModelGeometry, options: dict[str, Any], kept: str) -> None:
    folder = tmp_path / "hf"
    write_fp8(folder, geometry, **options)
    check_lossless(folder, expanded_by_transformers(folder), f"fp8 {kept}")


def test_the_validator_compares_with_the_expanded_source(tmp_path: Path) -> None:
    """The difference to the original weights is only the rounding of embedding, head and ignored projection."""
    write_fp8(tmp_path / "hf", EVEN)
    path = convert(tmp_path / "hf", tmp_path / "converted.safetensors")
    with Checkpoint.open(path) as checkpoint, Engine.load(path) as engine:
        truth = make_ground_truth(checkpoint, [5, 77, 200, 3], 0, "original", tmp_path / "hf")
        report = check(engine.backend, truth, isolate=True)
    assert report.passed, report.verdict()
    errors = {probe.name: probe.relative_l2 for probe in report.probes}
    assert errors["layer.0.q"] < 1e-5
    assert errors["layer.1.ffn"] > 1e-3
