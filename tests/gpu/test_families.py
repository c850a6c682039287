"""Families beyond Llama on a GPU: their kernels against float64, and tiny models against the CPU backend."""

from typing import Any

import numpy as np
import pytest
from device_launch import capability, chip
from family_geometries import FIELDS
from family_kernel_cases import check_add_norm, check_cap_logits, check_tiles
from kernel_cases import AttentionCase, RopeCase, check_attention, check_rope
from prefill_attention_cases import PrefillAttentionCase, check_prefill_attention
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.ops.cuda.attention.prefill_plan import choose_prefill_attention_plan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles

LIMIT = 3e-3  # relative L2 of logits, as in test_backend.py
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 256, "heads": 4, "kv_heads": 2, "hidden": 512, "ffn": 1024},
    "gemma3_text": {},
    "olmo2": {"head_dim": 128, "heads": 8, "kv_heads": 8, "hidden": 1024, "ffn": 1100},
    "phi3": {},
    "qwen2": {"qkv_bias": True, "head_dim": 64, "heads": 14, "kv_heads": 2, "hidden": 896, "ffn": 1280},
    "qwen3": {"qk_norm": True, "head_dim": 128, "heads": 16, "kv_heads": 8, "hidden": 1024, "ffn": 1536},
}

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_the_cpu(family: str) -> None:
    """A chunk on the GEMM path, a step of 5 tokens, then decode steps; windows of 16 begin to slide on the way."""
    geometry = tiny_geometry(**(FIELDS.get(family, {}) | FAMILIES[family]))
    tokens = np.random.default_rng(0).integers(0, geometry.vocabulary, 45).tolist()
    with Engine.random(geometry, "cuda", 96) as gpu, Engine.random(geometry, "cpu", 96) as cpu:
        assert gpu.backend.prefill_path is not None
        assert gpu.backend.prefill_path.name == "gemm"
        if family.startswith("qwen") and capability() >= (9, 0):
            assert str(gpu.backend.decode_path) == "persistent"
        got, expected = (
            np.concatenate([engine.feed(piece, all_logits=True) for piece in (tokens[:40], tokens[40:])])
            for engine in (gpu, cpu)
        )
        assert np.linalg.norm(got - expected) <= LIMIT * np.linalg.norm(expected)
        reply = gpu.generate_tokens(tokens, SamplingParams(max_tokens=24)).finish().token_ids
        cpu.reset()
        logits = cpu.feed(tokens + reply, all_logits=True)[len(tokens) - 1 : -1]
        best, chosen = logits.max(axis=1), logits[np.arange(len(reply)), reply]
        assert (best - chosen <= 4 * LIMIT * np.linalg.norm(logits, axis=1) / np.sqrt(geometry.vocabulary)).all()


@pytest.mark.parametrize("head_dim", [48, 192, 208, 256])
def test_attention_of_other_head_sizes(head_dim: int) -> None:
    for length in (129, 700):
        check_attention(AttentionCase(head_dim, 4, 2, 3, length, splits=8, warps=8))


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("window", [1, 600])
def test_attention_in_a_window(head_dim: int, window: int) -> None:
    for length in (5, 513, 900, 5000):
        check_attention(AttentionCase(head_dim, 4, 2, 5, length, splits=16, warps=8, window=window, soft_cap=5.0))


@pytest.mark.parametrize(("head_dim", "window", "soft_cap"), [(256, 700, 50.0), (128, 300, 0.0), (96, 0, 5.0)])
def test_attention_of_chunks(head_dim: int, window: int, soft_cap: float) -> None:
    out = ActivationTiles(4 * head_dim, 2048)
    plan = choose_prefill_attention_plan(4, 2, head_dim, out, chip(), window=window, soft_cap=soft_cap)
    for position, count in ((0, 200), (1000, 70)):
        sizes = head_dim, 4, 2, position, count, plan.query_tile, plan.key_block
        check_prefill_attention(PrefillAttentionCase(*sizes, sms=plan.sms, window=window, soft_cap=soft_cap))


def test_other_kernels() -> None:
    check_tiles(1000, 5)
    check_add_norm(2304, 5)
    check_add_norm(5376, 1)
    check_cap_logits(50_000, 30.0)
    check_rope(RopeCase(128, 40, 8, 3, norm=True, norm_of_all_heads=True))
