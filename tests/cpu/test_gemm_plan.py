"""Plans of GEMM kernels: what fits on an SM, few kernels for many numbers of tokens, tiles for the number of tokens."""

from dataclasses import replace

import pytest

from numba_atomflow.ops.cuda.gemm.kernels import gemm_kernel, make_gemm_swiglu
from numba_atomflow.ops.cuda.gemm.plan import MOST_PADDING, choose_gemm_plan, gemm_plan, mma_ctas_per_sm, modelled_us
from numba_atomflow.ops.cuda.gemm.wgmma import Shared
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.prefill.buckets import buckets_up_to
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.formats import FP16

H200 = Chip(132, 232448, (9, 0))
QKV, OUT, GATE_UP, DOWN = (  # Llama 3.2 3B
    PrepackedLayout(5120, 3072, 64),
    PrepackedLayout(3072, 3072),
    PrepackedLayout(16384, 3072, 8192),
    PrepackedLayout(3072, 8192),
)
BUCKETS = buckets_up_to(2048)


def x_of(layout: PrepackedLayout) -> ActivationTiles:
    return ActivationTiles(layout.in_features, 2048 + MOST_PADDING)


@pytest.mark.parametrize("layout", [QKV, OUT, GATE_UP, DOWN], ids=["qkv", "o", "gate_up", "down"])
def test_buckets_share_a_few_plans(layout: PrepackedLayout) -> None:
    plans = {choose_gemm_plan(layout, x_of(layout), tokens, H200) for tokens in BUCKETS}
    assert len(plans) <= 10
    for plan in plans:
        shared = Shared(plan, plan.stage_words)  # the most that an epilogue stages
        assert shared.bytes <= H200.shared_bytes
        assert plan.stages >= 4
    for tokens in BUCKETS:
        assert -tokens % choose_gemm_plan(layout, x_of(layout), tokens, H200).tile_tokens <= MOST_PADDING


def test_long_chunks_have_the_largest_tiles_and_short_ones_a_single_tile() -> None:
    assert choose_gemm_plan(GATE_UP, x_of(GATE_UP), 2048, H200).tile_tokens == 256
    assert choose_gemm_plan(DOWN, x_of(DOWN), 64, H200).tile_tokens == 64
    assert choose_gemm_plan(OUT, x_of(OUT), 16, H200).tile_tokens == 16


def test_sharing_tiles_makes_a_projection_with_few_of_them_faster() -> None:
    plan = gemm_plan(DOWN, x_of(DOWN), 256, H200)
    assert plan.row_tiles == 24
    alone = plan.units * 1.3
    assert modelled_us(plan, 256) < 0.5 * alone


def test_idle_warps_copy_fp8_weights_of_wide_tiles() -> None:
    fp16 = replace(DOWN, format=FP16)
    assert [gemm_plan(DOWN, x_of(DOWN), tokens, H200).copies_weights for tokens in (16, 32, 64, 256)] == [0, 0, 1, 1]
    assert not gemm_plan(fp16, replace(x_of(fp16), weight_bits=16), 128, H200).copies_weights
    assert not gemm_plan(DOWN, replace(x_of(DOWN), bits=8), 128, H200).copies_weights  # in the stages of X
    assert not gemm_plan(DOWN, x_of(DOWN), 64, Chip(108, 166912, (8, 0))).copies_weights


def test_one_wave_of_odd_tiles_is_taken_where_it_fills_the_gpu() -> None:
    """120 tiles of 176 tokens, in place of 80 of 256 or 160 of 128."""
    assert choose_gemm_plan(QKV, x_of(QKV), 512, H200).tile_tokens == 176
    assert choose_gemm_plan(OUT, x_of(OUT), 512, H200).tile_tokens == 104


@pytest.mark.parametrize(("layout", "tokens", "tile"), [(QKV, 640, 224), (OUT, 1024, 208), (GATE_UP, 896, 224)])
def test_other_buckets_have_tiles_that_fill_the_gpu(layout: PrepackedLayout, tokens: int, tile: int) -> None:
    """120 tiles of 224 tokens in place of 160 of 176; 120 of 208 in place of 96 of 256; 512 of 224, 640 of 192."""
    chosen = choose_gemm_plan(layout, x_of(layout), tokens, H200)
    assert chosen.tile_tokens == tile
    others = (gemm_plan(layout, chosen.x, size, H200) for size in (256, 192, 176, 128))
    assert modelled_us(chosen, tokens) < 0.9 * min(modelled_us(plan, tokens) for plan in others)


def test_tiles_never_exceed_the_activations() -> None:
    x = ActivationTiles(OUT.in_features, 512)
    assert 512 % choose_gemm_plan(OUT, x, 512, H200).tile_tokens == 0
    with pytest.raises(ValueError, match="520 tokens do not fit into tiles for at most 512"):
        choose_gemm_plan(OUT, x, 520, H200)


@pytest.mark.parametrize(
    "chip",
    [
        Chip(108, 166912, (8, 0)),
        Chip(82, 101376, (8, 6)),
        Chip(128, 101376, (8, 9)),
        H200,
        Chip(148, 232448, (10, 0)),
        Chip(170, 101376, (12, 0)),
    ],
    ids=lambda chip: "sm_{}{}".format(*chip.capability),
)
def test_all_ctas_of_a_grid_are_resident(chip: Chip) -> None:
    """They wait for each other. An SM has 1,024 bytes more than a CTA may have, and keeps as many for each CTA."""
    for layout in (GATE_UP, replace(GATE_UP, format=FP16)):
        x = ActivationTiles(layout.in_features, 2048 + MOST_PADDING, weight_bits=layout.format.bits)
        for plan in {choose_gemm_plan(layout, x, tokens, chip) for tokens in BUCKETS}:
            options = {"intermediate": ActivationTiles(8192, 2048)}  # staged: the epilogue with the most memory
            planned = gemm_kernel("gate_up", make_gemm_swiglu, plan, chip.dependent_launch, **options)
            spec, ctas = planned.spec, planned.ctas
            wgmma = plan.instructions == "wgmma"
            per_sm = plan.resident if wgmma else mma_ctas_per_sm(layout, plan.tile_tokens)
            assert ctas == chip.sms * per_sm
            assert per_sm * (spec.shared_bytes + 1024) <= chip.shared_bytes + 1024
            assert per_sm == 1 or spec.whole_carveout
            assert (
                spec.dependent
                == dict(spec.arguments)["dependent"]
                == (chip.dependent_launch and (wgmma or per_sm == 1))
            )
