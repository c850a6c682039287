"""The tilings of FP8 GEMMs."""

import pytest

from numba_atomflow.ops.cuda.gemm.plan import FP8_SLOT_WORDS, choose_gemm_plan
from numba_atomflow.ops.cuda.gemm.wgmma import Shared
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import pass_tokens
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.formats import FP16

H200 = Chip(132, 232448, (9, 0))
GATE_UP = PrepackedLayout(16384, 3072, 8192, k_tile=4)
LAYOUT, X = PrepackedLayout(3072, 8192, k_tile=4), ActivationTiles(8192, 2048, 8)


def test_few_tokens_have_small_tiles() -> None:
    x = ActivationTiles(3072, 2048, 8)
    assert [choose_gemm_plan(GATE_UP, x, tokens, H200).tile_tokens for tokens in (16, 32, 64)] == [16, 32, 64]


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128, 256, 2048])
def test_stages_with_their_scales_and_the_epilogue_fit_in_shared_memory(tokens: int) -> None:
    plan = choose_gemm_plan(LAYOUT, X, tokens, H200)
    assert tokens % plan.tile_tokens == 0
    assert plan.stages >= 3
    shared = Shared(plan, plan.tile_tokens * BLOCK_WORDS)  # SwiGLU's stage
    assert shared.weights - shared.scales == plan.stages * plan.tile_tokens
    assert shared.epilogue - shared.weights == plan.stages * FP8_SLOT_WORDS
    assert plan.resident * (shared.bytes + 1024) <= H200.shared_bytes + 1024


@pytest.mark.parametrize("tile_tokens", [8, 64, 104, 128, 160, 176, 192, 208, 224, 256])
def test_sums_and_accumulators_leave_registers_for_the_rest(tile_tokens: int) -> None:
    assert tile_tokens % pass_tokens(tile_tokens) == 0
    assert tile_tokens // 2 + pass_tokens(tile_tokens) // 2 <= 192


def test_only_what_multiplies_fp8_by_fp8_takes_fp8_activations() -> None:
    with pytest.raises(ValueError, match="FP8 activations"):
        choose_gemm_plan(LAYOUT, X, 64, Chip(108, 166912, (8, 0)))
    with pytest.raises(ValueError, match="FP8 activations"):
        choose_gemm_plan(PrepackedLayout(3072, 8192, format=FP16), X, 64, H200)
