"""Logits of tiny random models compared with transformers, over a grid of shapes and options of Llama models.

The other families, by what sets them apart, are in test_families_against_transformers.py.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from closeness import relative_l2
from reference import LIMIT, Reference, check_logits
from tiny_models import random_weights, tiny_geometry, write_hf_folder

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.formats import HeadFormat
from numba_atomflow.rope_scaling import Llama3Scaling

HEAD_DIMS, GQA_RATIOS = (64, 80, 96, 128), (1, 3, 4, 8)

# With 64 positions, rotary pairs of head_dim 64 to 128 lie on both sides of the scaled range and within it.
LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
GRID = list(itertools.product(HEAD_DIMS, GQA_RATIOS, (True, False), (None, LLAMA3)))


def geometry_of(number: int) -> ModelGeometry:
    """Model `number` of the grid; hidden and intermediate sizes vary, most are not multiples of 128."""
    head_dim, ratio, tied, scaling = GRID[number]
    return tiny_geometry(
        head_dim=head_dim,
        heads=2 * ratio if number % 3 == 0 and ratio < 8 else ratio,
        kv_heads=2 if number % 3 == 0 and ratio < 8 else 1,
        hidden=(192, 120, 384, 144, 264)[number % 5],  # transformers wants multiples of the number of heads
        ffn=(320, 256, 72, 129)[number % 4],
        vocabulary=(270, 288, 301)[number % 3],
        tied_embeddings=tied,
        rope_scaling=scaling,
        rope_theta=10000.0 if number % 2 else 500000.0,
        norm_eps=1e-6 if number % 7 == 0 else 1e-5,
        max_positions=512,
    )


def models(
    tmp_path: Path, geometry: ModelGeometry, seed: int, threads: int | None = None, head: HeadFormat = "fp8"
) -> tuple[Engine, Reference]:
    write_hf_folder(tmp_path / "hf", geometry, weights=random_weights(geometry, seed))
    engine = Engine.load(convert(tmp_path / "hf", tmp_path / "model.safetensors", head=head), threads=threads)
    return engine, Reference(tmp_path / "hf", engine.checkpoint)


@pytest.mark.parametrize(
    "number",
    range(len(GRID)),
    ids=[f"{d}-gqa{r}-{'tied' if t else 'untied'}-{'llama3' if s else 'plain'}" for d, r, t, s in GRID],
)
def test_logits(tmp_path: Path, number: int) -> None:
    geometry = geometry_of(number)
    # These matrices are too small to share, and on a busy machine threads wait long for each other.
    engine, reference = models(tmp_path, geometry, seed=number, threads=1)
    tokens = np.random.default_rng(number).integers(0, geometry.vocabulary, 48).tolist()
    expected = reference.logits(tokens)
    with engine:
        check_logits(engine.feed(tokens, all_logits=True), expected, "one block")
        engine.reset()
        check_logits(np.stack([engine.feed([token]) for token in tokens]), expected, "token by token")


@pytest.mark.parametrize("tied", [True, False])
def test_logits_with_a_head_in_float16(tmp_path: Path, tied: bool) -> None:
    geometry = tiny_geometry(tied_embeddings=tied)
    engine, reference = models(tmp_path, geometry, seed=200, threads=1, head="fp16")
    tokens = np.random.default_rng(200).integers(0, geometry.vocabulary, 48).tolist()
    expected = reference.logits(tokens)
    with engine:
        check_logits(engine.feed(tokens, all_logits=True), expected, "one block")
        engine.reset()
        check_logits(np.stack([engine.feed([token]) for token in tokens]), expected, "token by token")


def test_the_grid_has_every_combination() -> None:
    created = {(g.head_dim, g.gqa_ratio, g.tied_embeddings, g.rope_scaling) for g in map(geometry_of, range(64))}
    assert len(created) == 64
    assert any(g.kv_heads > 1 and g.gqa_ratio > 1 for g in map(geometry_of, range(64)))
    assert sum(g.hidden % 128 != 0 for g in map(geometry_of, range(64))) > 32


def test_a_long_prompt(tmp_path: Path) -> None:
    """More than one prefill chunk, and several tiles of keys."""
    geometry = tiny_geometry(heads=6, kv_heads=2, max_positions=1024, rope_scaling=LLAMA3)
    engine, reference = models(tmp_path, geometry, seed=100)
    tokens = np.random.default_rng(100).integers(0, geometry.vocabulary, 700).tolist()
    with engine:
        check_logits(engine.feed(tokens, all_logits=True), reference.logits(tokens), "in blocks")


@pytest.mark.parametrize("change", [{"rope_theta": 20000.0}, {"rope_scaling": LLAMA3}, {"norm_eps": 1e-3}])
def test_the_limit_detects_a_wrong_constant(tmp_path: Path, change: dict[str, object]) -> None:
    geometry = tiny_geometry()
    wrong = tiny_geometry(**change)
    write_hf_folder(tmp_path / "hf", geometry)
    write_hf_folder(tmp_path / "wrong", wrong)
    tokens = np.random.default_rng(0).integers(0, geometry.vocabulary, 48).tolist()
    with Engine.load(convert(tmp_path / "hf", tmp_path / "model.safetensors")) as engine:
        got = engine.feed(tokens, all_logits=True)
        expected = Reference(tmp_path / "wrong", engine.checkpoint).logits(tokens)
    assert relative_l2(got[-1], expected[-1]) > 3 * LIMIT
