"""The GEMM kernel of each projection of a model, and those with every other tile."""

from dataclasses import dataclass
from functools import cache

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.gemm.plan import MOST_PADDING, GemmPlan, gemm_plan, mma_plan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from prefill_bench.expectations import CHUNK

_TILES = (16, 32, 64, 104, 128, 160, 176, 192, 208, 224, 256)
_LARGEST_MMA_TILE = 128  # of main loops with mma.sync


@dataclass(frozen=True)
class GemmVariant:
    """A kernel that computes a projection.

    Attributes:
        name: its tile, with "fp8" for FP8 activations and "mma" for `mma.sync`.
        chosen: it is the one that `--prefill gemm` (or fp8) takes for this number of tokens.
    """

    name: str
    plan: GemmPlan
    planned: Planned
    chosen: bool


@cache
def _kernels(geometry: ModelGeometry, chip: Chip, tokens: int, *, fp8: bool) -> PrefillKernels:
    """Those of steps of up to `tokens` tokens: up to a chunk, the engine's own."""
    chunk = max(CHUNK, tokens)
    prefill = kernels_for(geometry, chip, "fp8", "auto", chunk=chunk, fp8_activations=fp8)[0].prefill
    assert prefill is not None
    return prefill


def gemm_layout(geometry: ModelGeometry, kind: str, chip: Chip) -> PrepackedLayout:
    """The prepacked layout of a projection, as the model has it."""
    return kernels_for(geometry, chip, "fp8", "auto")[0].layouts[kind]


def gemm_variants(geometry: ModelGeometry, kind: str, tokens: int, chip: Chip) -> list[GemmVariant]:
    """The chosen kernel first, then the one for FP8 activations where there is one, then those with every other tile
    that `tokens` fill but for `MOST_PADDING` of them.
    """
    has_wgmma = chip.capability[0] == 9
    fitting = [tile for tile in _TILES if tile <= tokens and -tokens % tile <= MOST_PADDING]
    tiles = [tile for tile in fitting if has_wgmma or tile <= _LARGEST_MMA_TILE]
    chosen, others = [], []
    for fp8 in (False, True) if has_wgmma else (False,):
        kernels = _kernels(geometry, chip, tokens, fp8=fp8)
        first = kernels.gemm_plan(kind, tokens)
        chosen.append(GemmVariant(_name(first), first, kernels.projection(kind, first), chosen=True))
        for tile in tiles:
            if tile != first.tile_tokens:
                plan = gemm_plan(first.layout, first.x, tile, chip)
                others.append(GemmVariant(_name(plan), plan, kernels.projection(kind, plan), chosen=False))
        if has_wgmma and not fp8:  # what GPUs without wgmma have
            plans = [
                mma_plan(first.layout, first.x, tile, chip)
                for tile in tiles
                if tile <= _LARGEST_MMA_TILE and tile % 16 == 0
            ]
            others += [GemmVariant(_name(plan), plan, kernels.projection(kind, plan), chosen=False) for plan in plans]
    return chosen + others


def _name(plan: GemmPlan) -> str:
    """For tables."""
    what = "fp8 " if plan.x.bits == 8 else "mma " if plan.instructions == "mma" else ""
    return f"{what}tile {plan.tile_tokens}"


def output_tiles(geometry: ModelGeometry, plan: GemmPlan) -> ActivationTiles:
    """What gate_up writes: x of the down projection."""
    return ActivationTiles(geometry.ffn, plan.x.tokens)
