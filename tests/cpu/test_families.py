"""Families that differ from Llama: what refuses them, and the language model of models that read images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import hf_config, random_weights, tiny_geometry, write_hf_folder, write_json

from numba_atomflow.backends.cuda.families import MOST_TOKENS, beyond_fast_paths, beyond_gemm, sliding_window
from numba_atomflow.backends.cuda.prefill_path import choose_prefill_path
from numba_atomflow.convert import convert
from numba_atomflow.errors import BackendError, OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.folding import original_heads, reordered_heads
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.sandbox.runner import check_family as check_sandbox
from numba_atomflow.sources import open_source

HOPPER = Chip(132, 232448, (9, 0))
BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"post_norm": True}, "norms after attention"),
    ({"pre_norm": False}, "no norm before attention"),
    ({"hidden_act": "gelu_tanh"}, "GELU"),
    ({"attention_soft_cap": 50.0}, "a soft cap of attention scores"),
    ({"logit_soft_cap": 30.0}, "a soft cap of logits"),
    ({"qk_norm": True, "qk_norm_of_all_heads": True}, "a norm of all heads"),
    ({"head_dim": 256}, "heads of 256"),
    ({"sliding_window": 64, "sliding_layers": (1,)}, "a sliding window of 64 positions"),
]


@pytest.mark.parametrize(("changes", "named"), BEYOND)
def test_what_the_fastest_kernels_cannot_do_is_named(changes: dict[str, Any], named: str) -> None:
    geometry = tiny_geometry(**changes)
    beyond = beyond_fast_paths(geometry, sliding_window(geometry, 128))
    assert beyond is not None
    assert named in beyond


def test_prompts_of_all_families_run_on_the_gemm_path() -> None:
    for changes, named in BEYOND:
        geometry = tiny_geometry(**changes)
        what: dict[str, Any] = {"beyond_gemm": beyond_gemm(geometry), "beyond_fp8": beyond_fast_paths(geometry, 64)}
        assert choose_prefill_path("auto", HOPPER, 128, **what).name == "gemm"
        with pytest.raises(BackendError, match=f"--prefill fp8 is not possible because the model has {named}"):
            choose_prefill_path("fp8", HOPPER, 128, **what)
    odd = beyond_gemm(tiny_geometry(hidden_act="gelu_tanh", ffn=20))
    assert choose_prefill_path("auto", HOPPER, 128, beyond_gemm=odd).name == "gemv"
    with pytest.raises(BackendError, match=r"GELU of 20 units.*use --prefill gemv"):
        choose_prefill_path("gemm", HOPPER, 128, beyond_gemm=odd)


def test_prompts_of_qwen_and_smollm3_may_have_fp8_activations() -> None:
    for changes in ({"qkv_bias": True}, {"qk_norm": True}, {"no_rope_layers": (1,)}):
        geometry = tiny_geometry(**changes)
        assert choose_prefill_path("fp8", HOPPER, 128, beyond_fp8=beyond_fast_paths(geometry, None)).name == "fp8"


def test_the_mass_of_all_tokens_of_a_vocabulary_fits_into_64_bits() -> None:
    sample_measures = pytest.importorskip("numba_atomflow.ops.cuda.token.sample_measures")
    unit = int(sample_measures.UNIT)
    assert MOST_TOKENS * unit < 1 << 63 <= (MOST_TOKENS + 1) * unit


def test_a_vocabulary_that_the_sampling_kernel_cannot_add_up_is_refused() -> None:
    pytest.importorskip("numba_cuda", reason="the CUDA backend's; there is none for macOS")
    from numba_atomflow.backends.cuda import plan

    assert {buffer.name for buffer in plan.SamplingState.plan(MOST_TOKENS)} >= {"sampling.seen"}
    with pytest.raises(BackendError, match=r"vocabulary has 524,288 tokens, .* at most 524,287; use --backend cpu"):
        plan.SamplingState.plan(MOST_TOKENS + 1)


def test_a_window_as_long_as_the_context_does_not_slide() -> None:
    geometry = tiny_geometry(sliding_window=64, sliding_layers=(0,))
    assert [sliding_window(geometry, length) for length in (63, 64, 65)] == [None, None, 64]
    for plain in (geometry, tiny_geometry(no_rope_layers=(1,), rotary_dim=32, residual_scale=0.2)):
        assert beyond_fast_paths(plain, sliding_window(plain, 64)) is None


def test_the_sandbox_and_calibration_refuse_layers_without_rope(tmp_path: Path) -> None:
    geometry = tiny_geometry(no_rope_layers=(1,), tied_embeddings=True)
    with pytest.raises(OptionError, match="layers with different RoPE"):
        check_sandbox(geometry)
    write_hf_folder(tmp_path / "hf", geometry)
    with pytest.raises(OptionError, match=r"layers with different RoPE.*use the method rtn"):
        convert(tmp_path / "hf", tmp_path / "out.safetensors", method="gptq")


def test_the_language_model_of_a_model_that_reads_images(tmp_path: Path) -> None:
    geometry = tiny_geometry()
    weights = random_weights(geometry)
    stored = {f"language_model.{name}": values for name, values in weights.items()}
    write_hf_folder(tmp_path, geometry, weights=stored | {"vision_tower.patch.weight": np.zeros((4, 4), np.float32)})
    text = hf_config(geometry, "mistral") | {"sliding_window": None}
    write_json(tmp_path / "config.json", {"model_type": "mistral3", "text_config": text, "vision_config": {}})
    source = open_source(tmp_path)
    assert source.geometry == geometry
    assert set(source.names()) == set(weights)
    np.testing.assert_array_equal(source.read("lm_head.weight"), weights["lm_head.weight"])


def test_heads_in_another_order_and_back() -> None:
    geometry = tiny_geometry(head_dim=64, rotary_dim=48)
    values = np.arange(3 * 64)
    reordered = reordered_heads(geometry, values)
    assert reordered[[0, 23, 24, 31, 32, 55, 56, 63]].tolist() == [0, 23, 48, 55, 24, 47, 56, 63]
    np.testing.assert_array_equal(original_heads(geometry, reordered), values)


def test_a_geometry_with_every_field_reads_back_from_json() -> None:
    geometry = tiny_geometry(
        sliding_window=16, sliding_layers=(1, 0), no_rope_layers=(1,), post_norm=True, logit_soft_cap=3.0
    )
    record = geometry.to_dict() | {"sliding_layers": [0, 1], "no_rope_layers": [1]}  # as JSON has them
    assert ModelGeometry.from_dict(record) == geometry
