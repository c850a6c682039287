"""The GEMM kernel of each projection of a model, and those with every other tile."""

from dataclasses import dataclass
from functools import cache

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.backends.cuda.prefill import PrefillKernels
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan, gemm_plan
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
        name: its tile. chosen: it is the one that a model takes for this number of tokens.
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
    """The chosen kernel first, then those with every other tile that divides `tokens`."""
    kernels = _kernels(geometry, chip, tokens)
    chosen = kernels.gemm_plan(kind, tokens)
    variants = [GemmVariant(tile_name(chosen), chosen, kernels.projection(kind, chosen), chosen=True)]
    for tile in _TILES:
        fits = tokens % tile == 0 and (chip.capability[0] == 9 or tile <= _LARGEST_MMA_TILE)
        if fits and tile != chosen.tile_tokens:
            plan = gemm_plan(chosen.layout, chosen.x, tile, chip)
            variants.append(GemmVariant(tile_name(plan), plan, kernels.projection(kind, plan), chosen=False))
    return variants


def tile_name(plan: GemmPlan) -> str:
    """The tile of a plan, for tables."""
    return f"tile {plan.tile_tokens}"


def output_tiles(geometry: ModelGeometry, plan: GemmPlan) -> ActivationTiles:
    """What gate_up writes: x of the down projection."""
    return ActivationTiles(geometry.ffn, plan.x.tokens)
