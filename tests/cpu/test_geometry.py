"""The geometry record: validation, derived sizes, and JSON."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import hf_config, tiny_geometry

from numba_atomflow.errors import GeometryError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.rope_scaling import Llama3Scaling, RopeScaling

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"hidden": -1}, "hidden is -1"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"max_positions": 0}, "max_positions is 0"),
        ({"kv_heads": 0}, "kv_heads is 0"),
        ({"heads": 4, "kv_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"heads": 2, "kv_heads": 4}, "2 attention heads cannot share 4 key/value heads"),
        ({"head_dim": 72}, "head_dim 72 is not supported"),
        ({"layers": 2.0}, r"layers is 2\.0; it must be a whole number"),
        ({"layers": True}, "layers is True"),
        ({"vocabulary": 2**63}, "vocabulary is 9223372036854775808"),
        ({"rope_theta": 0.0}, r"rope_theta is 0\.0; it must be a positive finite number"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"norm_eps": -1.0}, r"norm_eps is -1\.0"),
        ({"norm_eps": math.nan}, "norm_eps is nan"),
        ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
        ({"tied_embeddings": "yes"}, "tied_embeddings is 'yes'"),
        ({"qkv_bias": 1}, "qkv_bias is 1; it must be true or false"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling is {'factor'"),
    ],
)
def test_inconsistencies_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GeometryError, match=named):
        tiny_geometry(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factor": 0.0}, r"rope_scaling\.factor is 0\.0"),
        ({"low_freq_factor": "1"}, r"low_freq_factor is '1'"),
        ({"high_freq_factor": math.inf}, "high_freq_factor is inf"),
        ({"high_freq_factor": 1.0}, r"high_freq_factor is 1\.0; it must be above its low_freq_factor, 1\.0"),
        ({"original_max_positions": -5}, "original_max_positions is -5"),
        ({"original_max_positions": 64.0}, r"original_max_positions is 64\.0"),
    ],
)
def test_scaling_out_of_range_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(GeometryError, match=named):
        replace(LLAMA3, **changes)


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_a_record_in_json_reads_back(scaling: RopeScaling | None) -> None:
    geometry = tiny_geometry(rope_scaling=scaling, tied_embeddings=True, norm_eps=1e-6, rope_theta=5e5, qk_norm=True)
    assert ModelGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"layers": None},
        {"layers": "two"},
        {"rope_theta": "10000"},
        {"rope_scaling": {"factor": 8.0}},
        {"rope_scaling": [8.0]},
        {"rope_scaling": {}},
        {"rope_scaling": 0},
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(GeometryError):
        ModelGeometry.from_dict(tiny_geometry().to_dict() | change)


def test_a_record_without_family_fields_is_a_llama() -> None:
    record = tiny_geometry().to_dict()
    del record["qkv_bias"], record["qk_norm"]
    assert ModelGeometry.from_dict(record) == tiny_geometry()


def test_a_record_that_lacks_a_field_is_refused() -> None:
    record = tiny_geometry().to_dict()
    del record["hidden"]
    with pytest.raises(GeometryError, match="convert it again"):
        ModelGeometry.from_dict(record)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 4, 2), (80, 8, 1), (128, 3, 3)])
@pytest.mark.parametrize("family", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_parameters_are_those_of_transformers(
    head_dim: int, heads: int, kv_heads: int, tied: bool, family: dict[str, bool]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    geometry = tiny_geometry(head_dim=head_dim, heads=heads, kv_heads=kv_heads, tied_embeddings=tied, **family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config(geometry)))
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied head is listed once
    assert geometry.parameters() == expected
    assert geometry.parameter_count() == sum(math.prod(shape) for shape in expected.values())
