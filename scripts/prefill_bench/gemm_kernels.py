"""The GEMM kernel of each projection of a model, and those with every other tile."""

from dataclasses import dataclass, replace
from functools import cache

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.backends.cuda.prefill import PrefillKernels
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan, choose_gemm_plan, gemm_plan
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from prefill_bench.expectations import CHUNK

_TILES = (16, 32, 64, 128, 256)
_LARGEST_MMA_TILE = 128  # of main loops with mma.sync


@dataclass(frozen=True)
class GemmVariant:
    """A kernel that computes a projection.

    Attributes:
        name: its tile, and "fp8" for FP8 activations.
        chosen: it is the one that `--prefill gemm` (or fp8) takes for this number of tokens.
    """

    name: str
    plan: GemmPlan
    planned: Planned
    chosen: bool


@cache
def _kernels(geometry: ModelGeometry, chip: Chip, tokens: int) -> PrefillKernels:
    """Those of steps of up to `tokens` tokens: up to a chunk, the engine's own."""
    prefill = kernels_for(geometry, chip, "fp8", "auto", chunk=max(CHUNK, tokens))[0].prefill
    assert prefill is not None
    return prefill


def gemm_layout(geometry: ModelGeometry, kind: str, chip: Chip) -> PrepackedLayout:
    """The prepacked layout of a projection, as the model has it."""
    return kernels_for(geometry, chip, "fp8", "auto")[0].layouts[kind]


def gemm_variants(geometry: ModelGeometry, kind: str, tokens: int, chip: Chip) -> list[GemmVariant]:
    """The chosen kernel first, then the one for FP8 activations where there is one, then those with every other tile
    that divides `tokens`.
    """
    kernels = _kernels(geometry, chip, tokens)
    plans = [kernels.gemm_plan(kind, tokens)]
    has_wgmma = chip.capability[0] == 9
    if has_wgmma:
        plans.append(choose_gemm_plan(plans[0].layout, replace(plans[0].x, bits=8), tokens, chip))
    chosen = tuple(plans)
    for first in chosen:
        tiles = [tile for tile in _TILES if tokens % tile == 0 and (has_wgmma or tile <= _LARGEST_MMA_TILE)]
        plans += [gemm_plan(first.layout, first.x, tile, chip) for tile in tiles if tile != first.tile_tokens]
    return [GemmVariant(_name(plan), plan, kernels.projection(kind, plan), plan in chosen) for plan in plans]


def _name(plan: GemmPlan) -> str:
    """For tables."""
    return f"{'fp8 ' if plan.x.bits == 8 else ''}tile {plan.tile_tokens}"


def output_tiles(geometry: ModelGeometry, plan: GemmPlan) -> ActivationTiles:
    """What gate_up writes: x of the down projection."""
    return ActivationTiles(geometry.ffn, plan.x.tokens)
