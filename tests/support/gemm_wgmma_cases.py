"""The GEMM of sm_90 against float64, at small shapes: in the simulator, or on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from kernel_cases import fp16_weights, generator, launch, poisoned, relative_error, weights, within
from numpy.typing import NDArray

from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.gemm.epilogue import make_add_epilogue, make_store_epilogue, make_swiglu_epilogue
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.staged import make_staged_add_epilogue
from numba_atomflow.ops.cuda.gemm.wgmma import THREADS, make_gemm_wgmma, wgmma_shared_bytes
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_fp16_reference, prepack_reference
from numba_atomflow.ops.formats import FP8_E4M3, FP16, WeightFormat
from numba_atomflow.ops.fp8 import dequantize_groups


@dataclass(frozen=True)
class WgmmaCase:
    """A GEMM at one geometry. `ctas` below the number of tiles makes CTAs walk; other numbers make them share tiles.

    token_tiles: that are computed, of `capacity` tokens that the arrays have.
    """

    kind: str
    out_features: int
    in_features: int
    tile_tokens: int
    token_tiles: int = 1
    ctas: int = 1
    stages: int = 3
    format: WeightFormat = FP8_E4M3
    k_tile: int = 0
    min_units: int = 1

    @property
    def plan(self) -> GemmPlan:
        half = self.out_features // 2 if self.kind == "swiglu" else 0
        layout = PrepackedLayout(self.out_features, self.in_features, half, self.format, self.k_tile)
        x = ActivationTiles(self.in_features, self.capacity, weight_bits=self.format.bits)
        return GemmPlan(layout, x, self.tile_tokens, self.stages, self.ctas, 0, self.min_units)

    @property
    def capacity(self) -> int:
        return (self.token_tiles + 1) * self.tile_tokens


WGMMAS = (
    WgmmaCase("store", 130, 200, 8),  # 9 prepacked tiles: the second tile of rows has one; 2 units
    WgmmaCase("swiglu", 140, 200, 24, ctas=2, stages=5),  # one tile, whose two units are two CTAs'
    WgmmaCase("store", 40, 500, 8, ctas=3, format=FP16),  # 4 units for 3 CTAs
    WgmmaCase(
        "add", 37, 384, 8, token_tiles=2, ctas=3, stages=2, k_tile=2
    ),  # 6 units for 3 CTAs, of which one has the end of a tile and the start of the next; k-tiles of 2 and of 1
    WgmmaCase("staged add", 36, 256, 32, token_tiles=3, ctas=2),  # a tile for each CTA, and one that they share
)
COPIED = (  # beside those of `WGMMAS` with FP8 weights
    WgmmaCase("store", 130, 500, 8),  # two tiles of 4 units for one CTA: more than one round of the ring
    WgmmaCase("store", 40, 200, 8, ctas=2, min_units=2),  # a CTA without work
    WgmmaCase("add", 130, 640, 8, ctas=2, k_tile=4),  # a tile for each CTA, whose last unit is in a k-tile of its own
)


def gemm_weights(layout: PrepackedLayout, rng: np.random.Generator) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """A random projection with groups of scale 0 whose codes are not 0, prepacked; and its float64 values."""
    if layout.format.bits == 16:
        stored = fp16_weights(layout, rng)
        return prepack_fp16_reference(stored, layout), stored.astype(np.float64)
    codes, scales = weights(layout, rng)
    scales[:: max(1, len(scales) // 3), :1] = 0.0
    scales[1, -1] = 0.0
    return prepack_reference(codes, scales, layout), dequantize_groups(codes, scales).astype(np.float64)


def check_wgmma(case: WgmmaCase, *, dependent: bool = False) -> NDArray[Any]:
    """`check_gemm` of a kernel with `wgmma`."""
    return check_gemm(case, partial(run, dependent=dependent))


def check_gemm(case: WgmmaCase, run: Callable[..., None]) -> NDArray[Any]:
    """Relative L2 error against float64: 1e-5 for float32 outputs, 5e-4 for those rounded to float16.

    run: (case, epilogue, arguments) launches the kernel. Returns what it wrote.
    """
    rng, plan = generator(case.out_features, case.in_features, case.tile_tokens), case.plan
    words, matrix = gemm_weights(plan.layout, rng)
    x = rng.standard_normal((case.capacity, case.in_features)).astype(np.float16)
    done = case.token_tiles * case.tile_tokens
    x[done - 1 :] = np.nan  # padding tokens may be anything
    product = x.astype(np.float64) @ matrix.T
    partials = np.zeros(plan.partials, np.float32)
    common: dict[str, Any] = {
        "weights": words,
        "x": plan.x.pack(x),
        "partials": partials,
        "token_tiles": case.token_tiles,
    }
    shape, rows = (case.capacity, case.out_features), slice(0, done - 1)
    if case.kind == "store":
        y = poisoned(*shape)
        run(case, make_store_epilogue(plan), gemm.GemmStoreArguments(**common, y=y.reshape(-1)))
        within("GEMM", relative_error(y[rows], product[rows]), 1e-5)
        assert np.isnan(y[done:]).all(), "wrote tokens that are not computed"
        output = y
    elif case.kind.endswith("add"):
        make = make_staged_add_epilogue if case.kind == "staged add" else make_add_epilogue
        before = rng.standard_normal(shape).astype(np.float32)
        residual = before.copy()
        run(case, make(plan), gemm.GemmAddArguments(**common, residual=residual.reshape(-1)))
        within("GEMM", relative_error(residual[rows], (before + product)[rows]), 1e-5)
        assert (residual[done:] == before[done:]).all(), "wrote tokens that are not computed"
        output = residual
    else:
        units = case.out_features // 2
        tiles = ActivationTiles(units, case.capacity)
        intermediate = poisoned(tiles.words, dtype=np.uint32)
        run(case, make_swiglu_epilogue(plan, tiles), gemm.GemmSwigluArguments(**common, intermediate=intermediate))
        expected = silu_reference(product[:, :units]) * product[:, units:]
        output = tiles.unpack(intermediate)
        within("SwiGLU to float16", relative_error(output[rows], expected[rows]), 5e-4)
    assert not partials.any(), "partial sums are not zero for the next launch"
    return output[rows]


def run(case: WgmmaCase, epilogue: Any, io: Any, *, dependent: bool = False) -> None:
    plan = case.plan
    kernel = make_gemm_wgmma(plan, epilogue, dependent=dependent)
    launch(kernel, plan.ctas, THREADS, wgmma_shared_bytes(plan, epilogue), io)
