"""Logits of tiny random Mistral, Qwen2 and Qwen3 models compared with transformers."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from closeness import relative_l2
from reference import LIMIT, Reference, check_logits, torch
from tiny_models import random_weights, tiny_geometry, write_hf_folder, write_json

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry

FAMILIES = {"mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
GRID = list(itertools.product(FAMILIES, (64, 80, 96, 128), (True, False)))


def geometry_of(family: str, head_dim: int, tied: bool) -> ModelGeometry:
    """Hidden 200: neither heads * head_dim nor a multiple of 128, as in Qwen3 0.6B and 4B."""
    return tiny_geometry(
        hidden=200,
        heads=8 if tied else 5,
        kv_heads=2 if tied else 1,
        head_dim=head_dim,
        tied_embeddings=tied,
        norm_eps=1e-6,
        rope_theta=1e6,
        **FAMILIES[family],
    )


def load(folder: Path, family: str, geometry: ModelGeometry, seed: int = 0) -> tuple[Engine, Reference]:
    write_hf_folder(folder / "hf", geometry, weights=random_weights(geometry, seed), model_type=family)
    config = folder / "hf" / "config.json"
    # null, or a Mistral has a window of 4096; and what transformers 4 wrote into Qwen's, where it is switched off
    window = {"sliding_window": None} if family == "mistral" else {"sliding_window": 16, "use_sliding_window": False}
    write_json(config, json.loads(config.read_text()) | window)
    engine = Engine.load(convert(folder / "hf", folder / "model.safetensors"), threads=1)
    return engine, Reference(folder / "hf", engine.checkpoint)


@pytest.mark.parametrize(
    ("family", "head_dim", "tied"), GRID, ids=[f"{f}-{d}-{'tied' if t else 'untied'}" for f, d, t in GRID]
)
def test_logits(tmp_path: Path, family: str, head_dim: int, tied: bool) -> None:
    geometry = geometry_of(family, head_dim, tied)
    engine, reference = load(tmp_path, family, geometry, seed=head_dim)
    assert type(reference.model).__name__.lower().startswith(family)
    assert engine.checkpoint.geometry == geometry
    tokens = np.random.default_rng(head_dim).integers(0, geometry.vocabulary, 48).tolist()
    expected = reference.logits(tokens)
    with engine:
        check_logits(engine.feed(tokens, all_logits=True), expected, "one block")
        engine.reset()
        check_logits(np.stack([engine.feed([token]) for token in tokens]), expected, "token by token")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window(tmp_path: Path, family: str) -> None:
    geometry = tiny_geometry(max_positions=512, **FAMILIES[family])
    write_hf_folder(tmp_path / "hf", geometry, model_type=family)
    config = tmp_path / "hf" / "config.json"
    window = {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}
    write_json(config, json.loads(config.read_text()) | window)
    tokens = np.random.default_rng(7).integers(0, geometry.vocabulary, 40).tolist()
    with Engine.load(convert(tmp_path / "hf", tmp_path / "model.safetensors"), threads=1) as engine:
        assert engine.checkpoint.geometry.sliding_window == 32
        reference = Reference(tmp_path / "hf", engine.checkpoint)
        whole = reference.logits(tokens)  # the window slides in its last 8 rows
        check_logits(engine.feed(tokens, all_logits=True), whole, "a sliding window")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 512}))
    with Engine.load(convert(tmp_path / "hf", tmp_path / "wide.safetensors"), threads=1) as engine:
        assert relative_l2(engine.feed(tokens), whole[-1]) > 3 * LIMIT  # so the window was there


@pytest.mark.parametrize("part", ["q_proj.bias", "k_proj.bias", "v_proj.bias", "q_norm.weight", "k_norm.weight"])
def test_the_limit_detects_a_missing_part(tmp_path: Path, part: str) -> None:
    family = "qwen2" if part.endswith("bias") else "qwen3"
    geometry = geometry_of(family, 64, tied=False)
    engine, reference = load(tmp_path, family, geometry)
    tokens = np.random.default_rng(0).integers(0, geometry.vocabulary, 48).tolist()
    tensor = reference.model.get_parameter(f"model.layers.1.self_attn.{part}")
    with torch.no_grad(), engine:
        tensor.copy_(torch.zeros_like(tensor) if family == "qwen2" else torch.ones_like(tensor))
        assert relative_l2(engine.feed(tokens), reference.logits(tokens)[-1]) > 3 * LIMIT
