"""Hugging Face folders as a source: all layouts, and damage."""

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import (
    CHAT_TEMPLATE,
    random_weights,
    safetensors_bytes,
    tiny_geometry,
    write_hf_folder,
    write_json,
    write_safetensors,
)

from numba_atomflow.convert import convert
from numba_atomflow.errors import AtomFlowError, GeometryError, SourceError, SourceWarning
from numba_atomflow.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling
from numba_atomflow.sources import open_source
from numba_atomflow.sources.huggingface_config import config_geometry

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid folder with one weight file, for tests that damage it."""
    write_hf_folder(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A valid folder with three weight files and an index."""
    write_hf_folder(tmp_path / "model", shards=3)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_layout_gives_the_stored_values(tmp_path: Path, dtype: str, shards: int, tied: bool) -> None:
    geometry = tiny_geometry(tied_embeddings=tied)
    stored = write_hf_folder(tmp_path, geometry, dtype=dtype, shards=shards)
    source = open_source(tmp_path)
    assert source.geometry == geometry
    assert sorted(source.names()) == sorted(geometry.parameters())
    for name, values in stored.items():
        read = source.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, err_msg=name)
    np.testing.assert_array_equal(source.read(GATE, 7, 90), stored[GATE][7:90])
    weight_files = {file.name for file in source.files if file.suffix == ".safetensors"}
    assert len(weight_files) == shards


def test_test_models_round_bf16_as_torch() -> None:
    torch = pytest.importorskip("torch")
    from tiny_models import as_stored

    values = random_weights(tiny_geometry())[GATE]
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(as_stored(values, "BF16")[1], expected)


def test_text_assets_are_read(folder: Path) -> None:
    text = open_source(folder).text
    assert text.tokenizer_json == (folder / "tokenizer.json").read_bytes()
    assert (text.chat_template, text.bos_token, text.eos_token) == (CHAT_TEMPLATE, "<|bos|>", "<|eos|>")
    assert (text.eos_ids, text.add_bos) == ((1,), False)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 2]}, 3, (1, 2, 5)),  # 1 is the tokenizer's own
        ({"eos_token_id": 7}, 3, (1, 7)),
        ({}, 3, (1, 3)),
        ({}, [3, 4], (1, 3, 4)),
        ({}, None, (1,)),
    ],
)
def test_eos_ids(folder: Path, generation: dict[str, Any], config: Any, expected: tuple[int, ...]) -> None:
    write_json(folder / "generation_config.json", generation)
    change_json(folder / "config.json", eos_token_id=config)
    assert open_source(folder).text.eos_ids == expected


def test_chat_template_file_goes_before_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file ✓")
    assert open_source(folder).text.chat_template == "from the file ✓"


def test_of_several_chat_templates_the_default_is_used(folder: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change_json(folder / "tokenizer_config.json", chat_template=templates)
    assert open_source(folder).text.chat_template == "plain"


def test_special_tokens_as_objects_and_from_their_own_file(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"], config["eos_token"]
    write_json(folder / "tokenizer_config.json", config | {"add_bos_token": True})
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"})
    text = open_source(folder).text
    assert (text.bos_token, text.eos_token, text.add_bos) == ("<|bos|>", "<|eos|>", True)


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    source = open_source(folder)
    text = source.text
    assert (text.tokenizer_json, text.chat_template, text.eos_ids) == (None, None, (1,))
    assert "holds no tokenizer.json" in source.warnings[0]


# --- config.json ---------------------------------------------------------------------------------------------------


def change_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


UNPLACED = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
SCALED = Llama3Scaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_theta": None}, 1e4, None),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            5e5,
            Llama3Scaling(32.0, 1.0, 4.0, 8192),
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        # In two places: rope_scaling goes before rope_parameters, the theta of the record before the one beside it.
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_theta": 7.0}}, 7.0, SCALED),
        ({"rope_theta": None, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, 1e4, SCALED),
        ({"rope_theta": 5e5, "rope_scaling": {}, "rope_parameters": LLAMA3}, 5e5, SCALED),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": None, "rope_theta": None}}, 5e5, None),
        ({"rope_scaling": LLAMA3 | {"rope_type": None, "type": "llama3"}}, 1e4, SCALED),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}}, 1e4, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": UNPLACED, "original_max_position_embeddings": 8192}, 1e4, SCALED),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 8192}, 1e4, SCALED),
        ({"rope_scaling": UNPLACED, "max_position_embeddings": 8192}, 1e4, SCALED),  # transformers' default
    ],
)
def test_rope_of_old_and_new_configs(
    folder: Path, changes: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    change_json(folder / "config.json", **changes)
    geometry = open_source(folder).geometry
    assert (geometry.rope_theta, geometry.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"rope_theta": None, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "default"}, "rope_parameters": LLAMA3}, "factor"),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"factor": 8.0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1.0}, "rope_parameters": {"type": "llama3"}}, "rope_type"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ],
)
def test_conflicting_rope_settings(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    change_json(folder / "config.json", **changes)
    refused(folder, "config.json", fragment, "keep one")


def test_rope_in_two_records_is_as_in_transformers(folder: Path) -> None:
    """Accepted configs give the same RoPE as transformers."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    plain = json.loads((folder / "config.json").read_text())
    records: list[dict[str, Any] | None] = [None, {}, LLAMA3, {"rope_type": "default"}, {"rope_theta": 5e5}]
    records += [LLAMA3 | {"rope_theta": 5e5}, {"type": "linear", "factor": 1.0}]
    accepted = 0
    for scaling, parameters, theta in itertools.product(records, records, [None, 5e5]):
        changes = {"rope_scaling": scaling, "rope_parameters": parameters, "rope_theta": theta}
        config = plain | {key: value for key, value in changes.items() if value is not None}
        if theta is None:
            del config["rope_theta"]
        try:
            geometry = config_geometry(folder / "config.json", config)
        except SourceError:
            continue
        accepted += 1
        theirs = transformers.LlamaConfig(**copy.deepcopy(config)).rope_parameters
        scaled = theirs["rope_type"] == "llama3"
        assert (geometry.rope_theta, geometry.rope_scaling) == (theirs["rope_theta"], SCALED if scaled else None), (
            changes
        )
    assert accepted > 50


def test_default_kv_heads(folder: Path) -> None:
    """The default of the class if the key is absent; the number of heads if it is null."""
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 64}
    for family, expected in {"llama": 64, "mistral": 8, "qwen2": 32, "qwen3": 32}.items():
        config |= {"model_type": family, "num_key_value_heads": None}
        assert config_geometry(folder / "config.json", config).kv_heads == 64
        del config["num_key_value_heads"]
        assert config_geometry(folder / "config.json", config).kv_heads == expected


def test_sizes_that_configs_of_gemma_3_omit(folder: Path) -> None:
    """Those of models that read images give few sizes, such as that with 4 billion weights."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    g = config_geometry(folder / "config.json", {"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert (g.heads, g.kv_heads, g.head_dim, g.vocabulary, g.max_positions) == (8, 4, 256, 262208, 131072)
    assert (g.rope_scaling, g.local_rope_theta, g.tied_embeddings) == (LinearScaling(8.0), 1e4, True)
    assert set(range(34)) - set(g.sliding_layers) == {5, 11, 17, 23, 29}


SLIDING = {"sliding_window": 300, "use_sliding_window": True}


def test_optional_sizes(tmp_path: Path) -> None:
    geometry = tiny_geometry(hidden=256, kv_heads=4)
    write_hf_folder(tmp_path, geometry)
    change_json(tmp_path / "config.json", head_dim=None, num_key_value_heads=None)
    assert open_source(tmp_path).geometry == geometry


@pytest.mark.parametrize(
    ("family", "changes", "window", "layers"),
    [
        ("mistral", {"sliding_window": 300}, 300, (0, 1)),
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {"sliding_window": 8000}, None, ()),  # no position is outside of it
        ("qwen2", {"sliding_window": 300}, None, ()),  # switched off unless use_sliding_window is set
        ("qwen2", {"sliding_window": 300, "use_sliding_window": True, "max_window_layers": 1}, 300, (1,)),
        ("qwen2", {"sliding_window": 300, "use_sliding_window": True, "max_window_layers": 2}, None, ()),
        ("qwen2", {"sliding_window": 300, "use_sliding_window": True}, None, ()),  # from layer 28 on; there are two
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096, (0, 1)),
        ("qwen3", SLIDING | {"layer_types": ["full_attention"] * 2}, None, ()),
        ("qwen3", SLIDING | {"layer_types": ["full_attention", "sliding_attention"]}, 300, (1,)),
    ],
)
def test_sliding_windows(
    tmp_path: Path, family: str, changes: dict[str, Any], window: int | None, layers: tuple[int, ...]
) -> None:
    geometry = tiny_geometry(max_positions=8000, qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    write_hf_folder(tmp_path, geometry, model_type=family)
    change_json(tmp_path / "config.json", **changes)
    assert open_source(tmp_path).geometry == replace(geometry, sliding_window=window, sliding_layers=layers)


def test_a_qwen3_that_does_not_name_its_head_dim_has_128(tmp_path: Path) -> None:
    geometry = tiny_geometry(head_dim=128, qk_norm=True)
    write_hf_folder(tmp_path, geometry)
    change_json(tmp_path / "config.json", head_dim=None)
    assert open_source(tmp_path).geometry == geometry


@pytest.mark.parametrize(("family", "suffix"), [("qkv_bias", "k_proj.bias"), ("qk_norm", "q_norm.weight")])
def test_a_model_that_lacks_what_its_family_has(tmp_path: Path, family: str, suffix: str) -> None:
    geometry = tiny_geometry(**{family: True})
    weights = random_weights(geometry)
    del weights[f"model.layers.1.self_attn.{suffix}"]
    write_hf_folder(tmp_path, geometry, weights=weights)
    refused(tmp_path, f"lacks the tensor model.layers.1.self_attn.{suffix}")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model_type": "gemma4"}, "model_type 'gemma4'"),
        ({"model_type": "llama4"}, "Llama 4 is a mixture of experts"),
        ({"model_type": "gemma3"}, "lacks hidden_size"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, "model_type 'ministral3'"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers: [1]"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval: 0"),
        ({"model_type": "gemma2", "sliding_window_pattern": 0}, "sliding_window_pattern: 0"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"model_type": "granite", "residual_multiplier": -1}, "residual_multiplier: -1"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "lacks short_factor"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}}, "1 values"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "type 'linear_attention'"),
        ({"layer_types": 5}, "type 5,"),
        ({"sliding_window": "wide"}, "sliding_window: 'wide'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"model_type": {"llama": 1}}, "model_type {'llama': 1}"),
        ({"model_type": 10**900}, "model_type 1000"),
        ({"layer_types": [["full_attention"]]}, "type ['full_attention']"),
        ({"layer_types": {"a": 1}}, "type {'a': 1}"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu']"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "type ['llama3']"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "RoPE of its own for full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 without rope_type"),
        ({"rope_parameters": {"factor": 4, "rope_theta": 1e4}}, "factor 4 without rope_type"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4.0}}, "of type 'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor"),
        ({"quantization_config": {"quant_method": ["fp8"]}}, "quantized by ['fp8']"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": [1]}}, "format [1]"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": ["128", 128]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 10**400]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128.0, 128.0]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "9" * 5000 + "x128"}}, "weight_block"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}, "config_groups"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias; a bias in o_proj"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"mlp_bias": "yes"}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor: -4.0"),
        ({"rope_scaling": {"type": "yarn", "truncate": 2}}, "truncate: 2"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e300}}, "factor: 1e+300"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": -5}}, "original_max_position_embeddings: -5"),
        ({"original_max_position_embeddings": 0, "rope_scaling": {"type": "yarn"}}, "_embeddings: 0"),
        ({"original_max_position_embeddings": 1, "rope_scaling": {"type": "longrope"}}, "_embeddings: 1"),
        ({"max_position_embeddings": 10**400, "rope_scaling": {"type": "yarn"}}, "_embeddings: 1000"),
        ({"model_type": "phi3", "partial_rotary_factor": 1e308}, "partial_rotary_factor: 1e+308"),
        ({"model_type": "gemma2", "hidden_size": 10**400}, "hidden_size: 1000"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "192"}, "hidden_size: '192'"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"num_attention_heads": 0, "head_dim": None}, "0 attention heads"),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_unsupported_configs(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", **changes)
    refused(folder, fragment, "model")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"num_hidden_layers": 3}, ("lacks the tensor model.layers.2.input_layernorm.weight and 8 more",)),
        ({"num_hidden_layers": 1}, ("holds the tensor model.layers.1.",)),
        ({"num_hidden_layers": 10**12}, ("1000000000000 layers but holds only",)),
        ({"intermediate_size": 256}, ("gate_proj.weight", "(320, 192)", "(256, 192)")),
        ({"vocab_size": 300}, (EMBEDDING, "(288, 192)", "(300, 192)")),
        ({"num_key_value_heads": 4}, ("k_proj.weight", "(128, 192)", "(256, 192)")),
        ({"tie_word_embeddings": None, "vocab_size": 288}, ()),
    ],
)
def test_config_and_weights_that_differ(folder: Path, changes: dict[str, Any], fragments: tuple[str, ...]) -> None:
    change_json(folder / "config.json", **changes)
    if fragments:
        refused(folder, *fragments)
    else:
        assert not open_source(folder).geometry.tied_embeddings


def test_unsupported_sizes_name_the_config(folder: Path) -> None:
    change_json(folder / "config.json", head_dim=40)
    refused(folder, "config.json", "head_dim 40", error=GeometryError)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"max_position_embeddings": 2**63}, "max_positions is 9223372036854775808"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0; it must be above"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**63}}, "original_max_positions is 92233"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1e308}}, "frequencies that are no numbers"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1.0}, "frequencies that are no numbers"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1e300}}, "frequencies that are no numbers"),
        ({"rope_theta": 5e-324}, "frequencies that are no numbers"),
    ],
)
def test_numbers_out_of_range_name_the_config(folder: Path, changes: dict[str, Any], fragment: str) -> None:
    change_json(folder / "config.json", **changes)
    refused(folder, "config.json", fragment, error=GeometryError)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("outside", [288, -1, 10**400])
def test_eos_ids_outside_the_vocabulary_are_ignored_with_a_warning(folder: Path, where: str, outside: int) -> None:
    write_json(folder / "generation_config.json", {})
    change_json(folder / where, eos_token_id=[outside, 5])
    source = open_source(folder)
    assert source.text.eos_ids == (1, 5)
    (warning,) = source.warnings
    assert f"eos_token_id {str(outside)[:30]}" in warning
    assert str(folder) in warning
    with pytest.warns(SourceWarning, match="outside its vocabulary of 288 tokens; it is ignored"):
        convert(folder, folder.parent / "python.safetensors")
    warnings: list[str] = []
    convert(folder, folder.parent / "cli.safetensors", warn=warnings.append)
    assert warnings == [warning]


# --- tied embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_may_store_the_matrix_twice_if_both_are_equal(tmp_path: Path, equal: bool) -> None:
    weights = random_weights(tiny_geometry())
    weights[HEAD] = weights[EMBEDDING].copy()
    weights[HEAD][-1, -1] += 0.0 if equal else 1.0
    write_hf_folder(tmp_path, tiny_geometry(tied_embeddings=True), weights=weights, dtype="BF16")
    source = open_source(tmp_path)
    assert HEAD not in source.names()
    if equal:
        assert source.read(EMBEDDING).shape == (288, 192)
    else:
        source.read(EMBEDDING, 0, 200)
        with pytest.raises(SourceError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            source.read(EMBEDDING, 200)


def test_a_tied_model_with_another_head_shape(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    weights[HEAD] = np.zeros((10, 192), np.float32)
    write_hf_folder(tmp_path, tiny_geometry(tied_embeddings=True), weights=weights)
    refused(tmp_path, "holds the tensor lm_head.weight")


def test_an_untied_model_without_head_gets_a_hint(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    del weights[HEAD]
    write_hf_folder(tmp_path, weights=weights)
    refused(tmp_path, "lacks the tensor lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("head", ["tied", "untied", "none"])
def test_a_base_model_saved_alone(tmp_path: Path, shards: int, head: str) -> None:
    """LlamaModel.save_pretrained omits the prefix "model." and the head."""
    geometry = tiny_geometry(tied_embeddings=head == "tied")
    weights = random_weights(geometry)
    bare = {name.removeprefix("model."): values for name, values in weights.items()}
    if head == "none":
        del bare[HEAD]
    write_hf_folder(tmp_path, geometry, weights=bare, shards=shards)
    if head == "none":
        refused(tmp_path, "without its head (lm_head.weight)", "tie_word_embeddings")
        return
    source = open_source(tmp_path)
    assert sorted(source.names()) == sorted(geometry.parameters())
    for name, values in weights.items():
        np.testing.assert_array_equal(source.read(name), values, err_msg=name)


def test_a_base_model_with_a_tensor_under_both_names(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    bare = {name.removeprefix("model."): values for name, values in weights.items()}
    write_hf_folder(tmp_path, weights=bare | {"model.norm.weight": bare["norm.weight"]})
    refused(tmp_path, "tensor norm.weight with and without")


# --- folders and files that cannot be read -------------------------------------------------------------------------


def refused(folder: Path, *fragments: str, error: type[AtomFlowError] = SourceError) -> None:
    """Opening `folder` fails with one sentence that holds all the fragments."""
    with pytest.raises(error) as caught:
        open_source(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_no_permission(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain = Path.open

    def denied(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    refused(folder, f"{name} cannot be read (Permission denied)")


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ((), ("holds no config.json", "safetensors weights")),
        (("model.gguf",), ("holds no config.json", "model.gguf")),
        (("config.json",), ("holds no weights", "model.safetensors.index.json")),
        (("config.json", "pytorch_model.bin"), ("holds no weights", "convert pytorch_model.bin to safetensors")),
        (("model.safetensors",), ("holds no config.json", "add the model's config.json")),
        (("config.json", "consolidated.safetensors"), ("holds no weights", "rename consolidated.safetensors")),
    ],
)
def test_folders_without_a_model(
    folder: Path, tmp_path: Path, files: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in files:
        other.joinpath(name).write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"x")
    refused(other, "other", *fragments)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "model.gguf"]
)
def test_a_git_lfs_pointer_is_named(folder: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / name).write_bytes(pointer)
    refused(folder / name if name == "model.gguf" else folder, name, "Git LFS pointer", "git lfs pull")


def test_a_weight_file_instead_of_a_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "holds only weights", "config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"{'single': 'quotes'}", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"a": "\xff\xfe"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1, 2]", "holds a JSON list"),
    ],
)
def test_malformed_json(folder: Path, name: str, content: bytes, fragment: str) -> None:
    (folder / name).write_bytes(content)
    refused(folder, name, fragment)


def test_a_missing_and_an_extra_tensor(tmp_path: Path) -> None:
    weights = random_weights(tiny_geometry())
    del weights[GATE]
    write_hf_folder(tmp_path, weights=weights)
    refused(tmp_path, f"lacks the tensor {GATE};")

    weights = random_weights(tiny_geometry()) | {"model.layers.0.self_attn.q_proj.bias": np.zeros(256, np.float32)}
    write_hf_folder(tmp_path, weights=weights)
    refused(tmp_path, "holds the tensor model.layers.0.self_attn.q_proj.bias")


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(32, np.float32)}
    write_hf_folder(tmp_path, weights=random_weights(tiny_geometry()) | buffer)
    assert len(open_source(tmp_path).names()) == 21


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    geometry = tiny_geometry()
    weights = random_weights(geometry)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = -70000.0
    write_hf_folder(tmp_path, geometry, weights=weights)
    with pytest.raises(SourceError, match=r"up_proj\.weight of .* holds 7e\+04, beyond 65504"):
        open_source(tmp_path).read("model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_nan_and_infinity_are_named_when_read(tmp_path: Path, poison: float, dtype: str) -> None:
    weights = random_weights(tiny_geometry())
    weights[GATE][17, 3] = poison
    write_hf_folder(tmp_path, weights=weights, dtype=dtype)
    source = open_source(tmp_path)
    source.read(GATE, 18)
    with pytest.raises(SourceError, match=r"gate_proj\.weight of .*model\.safetensors holds a NaN or an infinity"):
        source.read(GATE, 10, 20)


# --- safetensors headers -------------------------------------------------------------------------------------------


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """The same file with its header edited in place."""

    def edit(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        return safetensors_bytes(change(header) or header, data[8 + length :])

    return edit


def set_tensor(**changes: Any) -> Callable[[bytes], bytes]:
    return with_header(lambda header: header[GATE].update(changes))


def shift(by: int) -> Callable[[bytes], bytes]:
    def move(header: dict[str, Any]) -> None:
        header[GATE]["data_offsets"] = [offset + by for offset in header[GATE]["data_offsets"]]

    return with_header(move)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is truncated"),
    "seven bytes": (lambda data: data[:7], "is truncated"),
    "length only": (lambda data: data[:8], "damaged"),
    "cut in the header": (lambda data: data[:200], "is truncated"),
    "cut in the data": (lambda data: data[:-1], "is truncated"),
    "trailing bytes": (lambda data: data + b"\0", "1 bytes after its last tensor"),
    "not safetensors": (lambda data: b"PK\x03\x04" + data, "is not a safetensors file"),
    "negative header length": (lambda data: (-1 % 2**64).to_bytes(8, "little") + data[8:], "is not a safetensors"),
    "header beyond the file": (lambda data: (50_000_000).to_bytes(8, "little") + data[8:], "is truncated"),
    "header of a list": (lambda data: safetensors_bytes([1, 2]), "is not a safetensors file"),
    "header cut short": (lambda data: safetensors_bytes(b'{"a": {'), "not valid JSON"),
    "header not UTF-8": (lambda data: safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (lambda data: safetensors_bytes(b'{"a":' * 100_000), "not valid JSON"),
    "a number of 10,000 digits": (lambda data: safetensors_bytes(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "tensor twice in the header": (lambda data: safetensors_bytes(b'{"a":1,"b":2,"a":1}'), "a is listed twice"),
    "tensor is a number": (with_header(lambda header: header | {GATE: 5}), "does not describe"),
    "field missing": (with_header(lambda header: header[GATE].pop("shape") and header), "does not describe"),
    "metadata of numbers": (with_header(lambda header: header | {"__metadata__": {"a": 1}}), "must map names"),
    "unknown dtype": (set_tensor(dtype="F4_E2M1"), "dtype 'F4_E2M1'"),
    "dtype of a list": (set_tensor(dtype=["F32"]), "dtype ['F32']"),
    "negative shape": (set_tensor(shape=[-320, -192]), "impossible shape"),
    "float shape": (set_tensor(shape=[320.0, 192]), "impossible shape"),
    "boolean shape": (set_tensor(shape=[True, 61440]), "impossible shape"),
    "huge shape": (set_tensor(shape=[2**62, 2**62]), "data_offsets"),
    "negative offsets": (set_tensor(data_offsets=[-245760, 0]), "impossible shape"),
    "reversed offsets": (set_tensor(data_offsets=[245760, 0]), "data_offsets are"),
    "huge offsets": (set_tensor(data_offsets=[2**63, 2**63 + 245760]), "starts at byte"),
    "three offsets": (set_tensor(data_offsets=[0, 1, 2]), "impossible shape"),
    "overlap": (shift(-4), "starts at byte"),
    "hole": (shift(4), "starts at byte"),
    "size and offsets differ": (set_tensor(shape=[320, 191]), "but its data_offsets"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_safetensors(folder: Path, damage: str) -> None:
    change, fragment = DAMAGES[damage]
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    refused(folder, "model.safetensors", fragment)


def test_an_unsupported_dtype(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(set_tensor(dtype="I32")(path.read_bytes()))
    with pytest.raises(SourceError, match=r"gate_proj\.weight of .* has dtype I32; supported are"):
        open_source(folder)


# --- shards --------------------------------------------------------------------------------------------------------

SHARD = "model-00002-of-00003.safetensors"


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refused(sharded, "index.json names " + SHARD)


def test_a_truncated_shard(sharded: Path) -> None:
    path = sharded / SHARD
    path.write_bytes(path.read_bytes()[:-100])
    refused(sharded, SHARD, "is truncated")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    weights = random_weights(tiny_geometry())
    names = list(weights)
    write_safetensors(sharded / SHARD, {name: weights[name] for name in [*names[1::3], names[0]]})
    refused(sharded, f"Tensor {names[0]} is both in model-00001-of-00003.safetensors and in {SHARD}")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"][EMBEDDING] = SHARD
    write_json(index, record)
    refused(sharded, f"{SHARD} holds the tensor {EMBEDDING}, but it does not")


@pytest.mark.parametrize(
    "value", ["../model-00001-of-00003.safetensors", "a" * 300, "/etc/passwd", "..", "", 5, "a\0b"]
)
def test_an_index_with_paths(sharded: Path, value: Any) -> None:
    index = sharded / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"][EMBEDDING] = value
    write_json(index, record)
    refused(sharded, "no weight_map")


@pytest.mark.parametrize("record", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(sharded: Path, record: Any) -> None:
    write_json(sharded / "model.safetensors.index.json", record)
    refused(sharded, "model")
