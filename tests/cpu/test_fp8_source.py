"""FP8 folders as a source: scales of every shape, unsupported schemes, and damage.

That real tools' checkpoints convert without loss is in test_fp8_reference_tooling.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import hf_config, random_weights, safetensors_bytes, tiny_geometry, write_json

from numba_atomflow.errors import SourceError
from numba_atomflow.ops.fp8 import e4m3_to_float
from numba_atomflow.sources import open_source
from numba_atomflow.sources.fp8_schemes import dequantize_e8m0

GATE = "model.layers.0.mlp.gate_proj"  # [320, 192]
Tensors = dict[str, tuple[str, NDArray[Any]]]  # name to safetensors dtype and values

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
PER_ROW = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def compressed(**weights: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
    }


def fp8_tensors(suffix: str, scale: NDArray[np.float32], rng: np.random.Generator) -> Tensors:
    """A float32 model with one FP8 projection."""
    tensors: Tensors = {name: ("F32", values) for name, values in random_weights(tiny_geometry()).items()}
    codes = rng.integers(0, 0x7F, (320, 192), np.uint8) | rng.choice(np.array([0, 0x80], np.uint8), (320, 192))
    tensors[f"{GATE}.weight"] = ("F8_E4M3", codes)
    tensors[f"{GATE}.{suffix}"] = ("F32", scale)
    return tensors


def write(folder: Path, tensors: Tensors, quantization: Any) -> None:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", hf_config(tiny_geometry()) | {"quantization_config": quantization})
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        end = len(data) + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), end]}
        data += values.tobytes()
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, data))


def scales(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.uniform(1e-4, 1e-2, shape).astype(np.float32)


def refused(folder: Path, *fragments: str) -> None:
    """Opening `folder`, or reading the projection, fails with one sentence that holds all the fragments."""
    with pytest.raises(SourceError) as caught:
        open_source(folder).read_fp8(f"{GATE}.weight")
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "suffix", "shape", "block"),
    [
        (compressed(strategy="tensor"), "weight_scale", (), (320, 192)),
        (compressed(strategy="tensor"), "weight_scale", (1,), (320, 192)),
        (compressed(), "weight_scale", (320, 1), (1, 192)),
        (compressed(), "weight_scale", (320,), (1, 192)),
        (compressed(strategy="block", block_structure=[128, 128]), "weight_scale", (3, 2), (128, 128)),
        (compressed(strategy="block", block_structure="64x128"), "weight_scale", (5, 2), (64, 128)),
        (compressed(strategy="group", group_size=128), "weight_scale", (320, 2), (1, 128)),
        (PER_ROW, "weight_scale", (320, 1), (1, 192)),
        (BLOCKS, "weight_scale_inv", (3, 2), (128, 128)),
        (BLOCKS | {"weight_block_size": [32, 128]}, "weight_scale_inv", (10, 2), (32, 128)),
        (BLOCKS | {"weight_block_size": [128, 256]}, "weight_scale_inv", (3, 1), (128, 192)),
        (BLOCKS | {"weight_block_size": None}, "weight_scale_inv", (), (320, 192)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", (), (320, 192)),  # AutoFP8
        ({"quant_method": "fp8"}, "weight_scale_inv", (3, 2), (128, 128)),
    ],
)
def test_every_scale_applies_to_its_weights(
    tmp_path: Path,
    rng: np.random.Generator,
    quantization: Any,
    suffix: str,
    shape: tuple[int, ...],
    block: tuple[int, int],
) -> None:
    tensors = fp8_tensors(suffix, scales(rng, *shape), rng)
    write(tmp_path, tensors, quantization)
    source = open_source(tmp_path)
    codes, scale = tensors[f"{GATE}.weight"][1], tensors[f"{GATE}.{suffix}"][1]
    grid = scale.reshape(-(-320 // block[0]), -(-192 // block[1]))
    expected = e4m3_to_float(codes) * np.kron(grid, np.ones(block, np.float32))[:320, :192]
    np.testing.assert_array_equal(source.read(f"{GATE}.weight"), expected)
    np.testing.assert_array_equal(source.read(f"{GATE}.weight", 100, 300), expected[100:300])
    assert source.read_fp8("lm_head.weight") is None
    stored = source.read_fp8(f"{GATE}.weight", 120, 140)
    assert stored is not None
    np.testing.assert_array_equal(stored[0], codes[120:140])
    assert (stored[1].dtype, stored[1].shape) == (np.float32, (20, 2))


def test_scales_in_half_precision_and_as_powers_of_two(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale_inv", scales(rng), rng)
    values = e4m3_to_float(tensors[f"{GATE}.weight"][1])
    for dtype, raw, meant in (
        ("F16", np.full((3, 2), 0.3, np.float16), np.float32(np.float16(0.3))),
        ("BF16", np.full((3, 2), 0x3F01, np.uint16), np.float32(0.50390625)),
        ("F8_E8M0", np.full((3, 2), 124, np.uint8), np.float32(0.125)),
    ):
        write(tmp_path, tensors | {f"{GATE}.weight_scale_inv": (dtype, raw)}, BLOCKS)
        np.testing.assert_array_equal(open_source(tmp_path).read(f"{GATE}.weight"), values * meant)


def test_e8m0_is_every_power_of_two_and_a_nan() -> None:
    decoded = dequantize_e8m0(np.arange(256, dtype=np.uint8))
    np.testing.assert_array_equal(decoded[:255], [2.0 ** (code - 127) for code in range(255)])
    assert np.isnan(decoded[255])


def test_scales_of_activations_and_of_the_cache_are_ignored(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    one = ("F32", np.ones(1, np.float32))
    extra = {f"{GATE}.input_scale": one, "model.layers.0.self_attn.k_scale": one, f"{GATE}.input_scale_ub": one}
    write(tmp_path, tensors | extra, compressed())
    assert sorted(open_source(tmp_path).names()) == sorted(tiny_geometry().parameters())


def test_a_folder_without_quantized_layers(tmp_path: Path) -> None:
    write(tmp_path, {name: ("F32", values) for name, values in random_weights(tiny_geometry()).items()}, compressed())
    assert open_source(tmp_path).fp8_scheme is None


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "fragments"),
    [
        ({"quant_method": "gptq"}, ("quantized by 'gptq'", "compressed-tensors, fbgemm_fp8 and fp8")),
        ({"bits": 4}, ("quantized by 'unknown'",)),
        ("fp8", ("quantization_config",)),
        (compressed(type="int"), ("8-bit int weights", "'float-quantized'")),
        (compressed(num_bits=4), ("4-bit float",)),
        (compressed(symmetric=False), ("asymmetric 8-bit float",)),
        (compressed() | {"format": "nvfp4-pack-quantized"}, ("'nvfp4-pack-quantized'",)),
        (compressed() | {"format": None}, ("8-bit float weights as None",)),
        (compressed(strategy="tensor_group"), ("strategy 'tensor_group'",)),
        (compressed(strategy="group", group_size=32), ("every 32 columns (group_size)", "without loss")),
        (compressed(strategy="group"), ("group_size: [1, None]",)),
        (compressed(strategy="block", block_structure=[128]), ("block_structure: [128]",)),
        (compressed(strategy="block", block_structure="128"), ("block_structure: '128'",)),
        (compressed(strategy="block", block_structure="axb"), ("block_structure: 'axb'",)),
        (compressed() | {"config_groups": {}}, ("config_groups: {}",)),
        (compressed() | {"config_groups": {"FP8": ["Linear"]}}, ("config_groups",)),
        (compressed() | {"config_groups": {"g": {"weights": None}}}, ("unquantized weights",)),
        (compressed() | {"transform_config": {"config_groups": {"R1": {}}}}, ("with a transform_config",)),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ("with a sparsity_config",)),
        (BLOCKS | {"weight_block_size": [128, 64]}, ("every 64 columns (weight_block_size)", "multiples of 128")),
        (BLOCKS | {"weight_block_size": [128, 192]}, ("every 192 columns",)),
        (BLOCKS | {"weight_block_size": [0, 128]}, ("weight_block_size: [0, 128]",)),
        (BLOCKS | {"weight_block_size": 128}, ("weight_block_size: 128",)),
        (BLOCKS | {"fmt": "e5m2"}, ("FP8 format 'e5m2'",)),
    ],
)
def test_unsupported_schemes_are_named(
    tmp_path: Path, rng: np.random.Generator, quantization: Any, fragments: tuple[str, ...]
) -> None:
    write(tmp_path, fp8_tensors("weight_scale", scales(rng, 320, 1), rng), quantization)
    refused(tmp_path, "config.json", *fragments)


@pytest.mark.parametrize(
    ("quantization", "suffix", "shape", "fragments"),
    [
        (compressed(), "weight_scale", (192, 1), ("[192, 1], not [320, 1]", "per channel", "[320, 192]")),
        (compressed(), "weight_scale", (), ("[], not [320, 1]",)),
        (compressed(), "weight_scale", (1, 320), ("[1, 320], not [320, 1]",)),
        (compressed(strategy="tensor"), "weight_scale", (320, 1), ("[320, 1], not [1, 1]", "per tensor")),
        (PER_ROW, "weight_scale", (319, 1), ("[319, 1], not [320, 1]", "fbgemm_fp8")),
        (BLOCKS, "weight_scale_inv", (2, 3), ("[2, 3], not [3, 2]", "in blocks of 128 x 128")),
        (BLOCKS, "weight_scale_inv", (3, 1), ("[3, 1], not [3, 2]",)),
        (BLOCKS, "weight_scale_inv", (2, 2), ("[2, 2], not [3, 2]",)),
        (BLOCKS, "weight_scale_inv", (3, 2, 1), ("[3, 2, 1], not [3, 2]",)),
    ],
)
def test_scales_of_a_wrong_shape(
    tmp_path: Path,
    rng: np.random.Generator,
    quantization: Any,
    suffix: str,
    shape: tuple[int, ...],
    fragments: tuple[str, ...],
) -> None:
    write(tmp_path, fp8_tensors(suffix, scales(rng, *shape), rng), quantization)
    refused(tmp_path, f"Tensor {GATE}.{suffix} of {tmp_path}/model.safetensors has shape", *fragments)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_a_nan_are_named_when_read(tmp_path: Path, rng: np.random.Generator, code: int) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    tensors[f"{GATE}.weight"][1][17, 3] = code
    write(tmp_path, tensors, compressed())
    source = open_source(tmp_path)
    source.read(f"{GATE}.weight", 18)
    for read in (source.read, source.read_fp8):
        with pytest.raises(SourceError, match=r"gate_proj\.weight of .*model\.safetensors holds a NaN; the file is"):
            read(f"{GATE}.weight", 10, 20)


@pytest.mark.parametrize("bad", [0.0, -0.5, np.nan, np.inf, 150.0])
def test_invalid_scales_are_named_when_read(tmp_path: Path, rng: np.random.Generator, bad: float) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    tensors[f"{GATE}.weight_scale"][1][5] = bad
    write(tmp_path, tensors, compressed())
    refused(tmp_path, f"Tensor {GATE}.weight_scale of", f"holds the scale {bad:.3g}, which is not between 0 and 146")


def test_an_invalid_e8m0_scale(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale_inv", scales(rng), rng)
    write(tmp_path, tensors | {f"{GATE}.weight_scale_inv": ("F8_E8M0", np.full((3, 2), 255, np.uint8))}, BLOCKS)
    refused(tmp_path, "holds the scale nan")


def test_a_scale_of_an_unsupported_dtype(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale_inv", scales(rng), rng)
    write(tmp_path, tensors | {f"{GATE}.weight_scale_inv": ("I32", np.ones((3, 2), np.int32))}, BLOCKS)
    refused(tmp_path, f"Tensor {GATE}.weight_scale_inv of", "has dtype I32")


def test_codes_without_scales_and_scales_without_codes(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    alone = {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_scale")}
    write(tmp_path, alone, compressed())
    refused(tmp_path, f"Tensor {GATE}.weight of", "is FP8, but", "holds no scale for it (weight_scale)")
    write(tmp_path, tensors | {f"{GATE}.weight": ("F32", np.ones((320, 192), np.float32))}, compressed())
    refused(tmp_path, f"holds the tensor {GATE}.weight_scale, which is not part of a model")
    write(tmp_path, tensors | {f"{GATE}.weight_scale_inv": tensors[f"{GATE}.weight_scale"]}, {"quant_method": "fp8"})
    refused(tmp_path, "weight_scale", "has shape [320, 1], not [1, 1] or [3, 2]")


def test_a_norm_in_fp8(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    norm = {
        "model.norm.weight": ("F8_E4M3", np.full(192, 0x38, np.uint8)),
        "model.norm.weight_scale": ("F32", scales(rng)),
    }
    write(tmp_path, tensors | norm, compressed())
    refused(tmp_path, "Tensor model.norm.weight of", "is FP8, but")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_may_store_its_fp8_matrix_twice_if_both_are_equal(
    tmp_path: Path, rng: np.random.Generator, equal: bool
) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    codes, scale = rng.integers(0, 0x7F, (288, 192), np.uint8), scales(rng, 288, 1)
    for name, factor in (("model.embed_tokens", 1), ("lm_head", 1 if equal else 2)):
        tensors[f"{name}.weight"] = ("F8_E4M3", codes)
        tensors[f"{name}.weight_scale"] = ("F32", scale * np.float32(factor))
    write(tmp_path, tensors, compressed())
    config = tmp_path / "config.json"
    write_json(config, json.loads(config.read_text()) | {"tie_word_embeddings": True})
    source = open_source(tmp_path)
    if equal:
        stored = source.read_fp8("model.embed_tokens.weight", 3, 9)
        assert stored is not None
        np.testing.assert_array_equal(stored[0], codes[3:9])
    else:
        for read in (source.read, source.read_fp8):
            with pytest.raises(SourceError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
                read("model.embed_tokens.weight", 3, 9)


def test_fp8_that_config_json_does_not_mention(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = fp8_tensors("weight_scale", scales(rng, 320, 1), rng)
    del tensors[f"{GATE}.weight_scale"]
    write(tmp_path, tensors, None)
    with pytest.raises(SourceError, match=r"gate_proj\.weight of .* has dtype F8_E4M3; supported are"):
        open_source(tmp_path)
