"""GGUF files of families beyond Llama, Qwen2 and Qwen3: the same model as the Hugging Face folder, or refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_geometries import family_geometry, family_weights
from family_gguf import ARCHITECTURES, write_family_gguf
from tiny_models import write_hf_folder

from numba_atomflow.errors import AtomFlowError, SourceError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import LinearScaling, LongRopeScaling
from numba_atomflow.sources import open_source

SIZES: dict[str, Any] = {"hidden": 64, "heads": 2, "kv_heads": 1, "ffn": 48, "vocabulary": 40}
# What llama.cpp has in its code, and a file cannot differ in.
IMPLIED: dict[str, dict[str, Any]] = {
    "gemma2": {"layers": 3, "sliding_layers": (0, 2), "attention_scale": 32**-0.5, "embedding_scale": 8.0},
    "gemma3_text": {"layers": 7, "sliding_layers": (0, 1, 2, 3, 4, 6), "attention_scale": 32**-0.5}
    | {"embedding_scale": 8.0},
}


def geometry_of(family: str, **changes: Any) -> ModelGeometry:
    return family_geometry(family, **(SIZES | IMPLIED.get(family, {}) | changes))


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_file_is_the_model_of_the_folder(tmp_path: Path, family: str) -> None:
    geometry = geometry_of(family)
    scaling = geometry.rope_scaling
    if isinstance(scaling, LongRopeScaling):  # float32 in a file
        short, long = (tuple(map(float, np.float32(x))) for x in (scaling.short_factors, scaling.long_factors))
        geometry = replace(geometry, rope_scaling=replace(scaling, short_factors=short, long_factors=long))
    weights = family_weights(geometry)
    write_hf_folder(tmp_path / "hf", geometry, weights=weights)
    write_family_gguf(tmp_path / "model.gguf", family, geometry, weights)
    folder, file = open_source(tmp_path / "hf"), open_source(tmp_path / "model.gguf")
    assert folder.geometry == file.geometry == geometry
    assert sorted(folder.names()) == sorted(file.names())
    for name in folder.names():
        np.testing.assert_array_equal(file.read(name), folder.read(name), err_msg=name)
        np.testing.assert_array_equal(file.read(name, 3, 21), folder.read(name, 3, 21), err_msg=name)


def opened(path: Path, family: str, geometry: ModelGeometry, **fields: Any) -> ModelGeometry:
    path.unlink(missing_ok=True)
    named = {key.replace("__", "."): value for key, value in fields.items()}
    write_family_gguf(path, family, geometry, family_weights(geometry), named)
    return open_source(path).geometry


def test_defaults_are_those_of_llama_cpp(tmp_path: Path) -> None:
    path, geometry = tmp_path / "model.gguf", geometry_of("gemma2", max_positions=8192)
    absent = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention__sliding_window": None}
    expected = replace(geometry, attention_soft_cap=50.0, logit_soft_cap=30.0, sliding_window=4096)
    assert opened(path, "gemma2", geometry, **absent) == expected
    assert opened(path, "gemma2", geometry, final_logit_softcapping=0.0).logit_soft_cap is None
    largest = geometry_of("gemma2", layers=46, sliding_layers=tuple(range(0, 46, 2)))
    assert opened(path, "gemma2", largest).attention_scale == 32**-0.5  # hidden size by heads
    assert opened(path, "gemma2", geometry, attention__scale=0.5).attention_scale == 0.5
    flags = [False, True, True]
    assert opened(path, "gemma2", geometry, attention__sliding_window_pattern=flags).sliding_layers == (1, 2)
    small = geometry_of("gemma3_text")
    assert opened(path, "gemma3_text", small, rope__freq_base_swa=5000.0).local_rope_theta == 5000.0
    old = {"rope__scaling__factor": None, "rope__scaling__type": None, "rope__scale_linear": 4.0}
    assert opened(path, "gemma3_text", small, **old).rope_scaling == LinearScaling(4.0)
    assert opened(path, "gemma3_text", small, attention__sliding_window=None).sliding_layers == ()


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    geometry = geometry_of("phi3")
    got = opened(tmp_path / "model.gguf", "phi3", geometry, attention__sliding_window=geometry.max_positions)
    assert (got.sliding_window, got.sliding_layers) == (None, ())


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"attention.sliding_window_pattern": "2"}),
        ("gemma2", {"attention.sliding_window_pattern": [True]}),
        ("gemma2", {"attn_logit_softcapping": -1.0}),
        ("gemma2", {"logit_scale": 4.0}),
        ("gemma2", {"block_count": 2_000_000_000}),
        ("gemma3_text", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gemma3_text", {"embedding_length": 0}),
        ("phi3", {"rope.scaling.original_context_length": 0}),
        ("phi3", {"rope.dimension_count": 80}),
        ("phi3", {"rope.dimension_count": 32}),
        ("granite", {"residual_scale": float("nan")}),
        ("granite", {"rope.dimension_count": 24}),
        ("granite", {"attention.scale": 1e38}),
        ("granite", {"logit_scale": 1e-45}),
        ("smollm3", {"embedding_scale": 2.0}),
        ("olmo2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}),
    ],
    ids=str,
)
def test_what_a_file_cannot_mean_is_refused_in_a_sentence(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    geometry = geometry_of(family)
    write_family_gguf(tmp_path / "model.gguf", family, geometry, family_weights(geometry), fields)
    with pytest.raises(AtomFlowError, match=r"model\.gguf"):
        open_source(tmp_path / "model.gguf")


def test_a_fused_projection_of_other_sizes_is_refused(tmp_path: Path) -> None:
    geometry = geometry_of("phi3")
    weights = family_weights(geometry)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    weights[name] = weights[name][:-1]
    write_family_gguf(tmp_path / "model.gguf", "phi3", geometry, weights)
    with pytest.raises(SourceError, match=r"blk\.1\.attn_qkv\.weight"):
        open_source(tmp_path / "model.gguf")
