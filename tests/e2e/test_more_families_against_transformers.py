"""Logits of tiny random models of families whose layers differ from Llama's, compared with transformers."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import relative_l2
from family_geometries import FIELDS, WINDOW, family_geometry, family_weights
from reference import LIMIT, Reference, check_logits
from tiny_models import hf_config, tiny_geometry, write_hf_folder, write_json

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, YarnScaling

TOKENS = 5 * WINDOW


def converted(folder: Path, geometry: ModelGeometry, seed: int = 0) -> tuple[Path, Path]:
    """A model folder and its checkpoint."""
    write_hf_folder(folder / "hf", geometry, weights=family_weights(geometry, seed))
    return folder / "hf", convert(folder / "hf", folder / "model.safetensors")


def compare(folder: Path, geometry: ModelGeometry, count: int = TOKENS, max_seq_len: int | None = None) -> None:
    """All logits of a prompt, and of the same tokens one by one."""
    source, checkpoint = converted(folder, geometry)
    tokens = np.random.default_rng(1).integers(0, geometry.vocabulary, count).tolist()
    with Engine.load(checkpoint, max_seq_len=max_seq_len, threads=1) as engine:
        assert engine.checkpoint.geometry == geometry
        expected = Reference(source, engine.checkpoint).logits(tokens)
        check_logits(engine.feed(tokens, all_logits=True), expected, "one block")
        engine.reset()
        first = engine.feed(tokens[: count // 2])
        rest = [engine.feed([token]) for token in tokens[count // 2 :]]
        check_logits(np.stack([first, *rest]), expected[count // 2 - 1 :], "token by token")


@pytest.mark.parametrize("family", FIELDS)
def test_logits(tmp_path: Path, family: str) -> None:
    longest = 64 if family == "phi3" else None  # within the original context
    compare(tmp_path, family_geometry(family), min(TOKENS, longest or TOKENS), longest)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [32, 64, 112, 128, 192, 256])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2"])
def test_sizes_of_heads(tmp_path: Path, family: str, head_dim: int) -> None:
    compare(tmp_path, family_geometry(family, head_dim=head_dim))


ORIGINAL = 32
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": LinearScaling(4.0)},
    "dynamic": {"rope_scaling": DynamicScaling(4.0, ORIGINAL), "max_positions": 4 * ORIGINAL},
    "yarn": {"rope_scaling": YarnScaling(4.0, ORIGINAL, YarnScaling.default_attention_factor(4.0))},
    "llama3": {"rope_scaling": Llama3Scaling(4.0, 1.0, 4.0, ORIGINAL)},
}


@pytest.mark.parametrize("count", [ORIGINAL - 1, ORIGINAL + 1, 4 * ORIGINAL])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_around_its_original_length(tmp_path: Path, kind: str, count: int) -> None:
    """The length is that of the KV cache: transformers' that of the sequence, which is as long here."""
    compare(tmp_path, tiny_geometry(layers=1, **SCALINGS[kind]), count, count)


@pytest.mark.parametrize("count", [63, 65, 4 * 64])
def test_longrope_around_its_original_length(tmp_path: Path, count: int) -> None:
    compare(tmp_path, family_geometry("phi3", sliding_window=None, sliding_layers=()), count, count)


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("gemma3_text", {"sliding_window": WINDOW - 1}),
    ("gemma3_text", {"sliding_layers": (0, 2)}),
    ("gemma3_text", {"local_rope_theta": 2e4}),
    ("gemma3_text", {"attention_scale": 25**-0.5}),
    ("gemma3_text", {"hidden_act": "silu"}),
    ("gemma2", {"attention_soft_cap": 6.0}),
    ("gemma2", {"logit_soft_cap": 3.3}),
    ("phi3", {"rope_scaling": None}),
    ("smollm3", {"no_rope_layers": (2,)}),
    ("granite", {"residual_scale": 0.23}),
    ("granite", {"embedding_scale": 13.0}),
    ("granite", {"logit_scale": 1 / 9}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folder and the checkpoint of each family, made on first use."""

    @cache
    def of(family: str) -> tuple[Path, Path]:
        return converted(tmp_path_factory.mktemp(family), family_geometry(family))

    return of


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=[f"{f}-{next(iter(c))}" for f, c in CHANGES])
def test_the_limit_detects_another_setting(
    folders: Callable[[str], tuple[Path, Path]], family: str, changes: dict[str, Any]
) -> None:
    source, path = folders(family)
    geometry = family_geometry(family)
    tokens = np.random.default_rng(2).integers(0, geometry.vocabulary, 40).tolist()
    with Engine.load(path, max_seq_len=64, threads=1) as engine:
        write_json(source / "config.json", hf_config(replace(geometry, **changes)))
        expected = Reference(source, engine.checkpoint).logits(tokens)
        assert relative_l2(engine.feed(tokens), expected[-1]) > 3 * LIMIT
