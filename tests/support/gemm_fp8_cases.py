"""The FP8 GEMM against float64: in the simulator, or on a GPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_cases import generator, launch, poisoned, relative_error, weights, within
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.gemm.kernels import gemm_kernel, make_gemm_add, make_gemm_store, make_gemm_swiglu
from numba_atomflow.ops.cuda.gemm.plan import FP8_SLOT_WORDS, FP8_TILE_WORDS, GemmPlan
from numba_atomflow.ops.cuda.gemm.weight_copies import make_read_scales
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import A_WORDS, make_group_products, pass_tokens, read_fragments
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, PrepackedLayout, make_offsets, prepack_reference
from numba_atomflow.ops.fp8 import dequantize_groups

# Relative L2 of float32 sums: the twin of wgmma is exact; Hopper's FP8 sums have some 14 bits (predicted: 1.3e-4).
LIMIT = 1e-5 if ptx.SIMULATED else 1e-3


def group_by_group_kernel(plan: GemmPlan) -> Any:
    """Kernel (weights, x, y): a CTA of two warpgroups has the only tile; y [tokens, 128]. No pipeline."""
    groups, tokens, tile_words = plan.layout.groups, plan.tile_tokens, plan.layout.tile_words
    x_words, scales_start, last_tile = tokens * BLOCK_WORDS, plan.x.scales_start, plan.layout.tiles - 1
    codes_at, scale_at = make_offsets(plan.layout)
    read_scales = make_read_scales(plan.layout)
    start_pass, wait, promote, passes = make_group_products(tokens)
    accumulators, sums_count, slot = pass_tokens(tokens) // 2, tokens // 2, x_words + tokens
    chunk_rows = 4 if plan.layout.split_rows else 2

    @ptx.kernel(256, 1)
    def group_by_group(weights, x, y):
        words = cuda.shared.array(0, uint32)
        sums = cuda.local.array(sums_count, float32)
        products, a = cuda.local.array(accumulators, float32), cuda.local.array(A_WORDS, uint32)
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        descriptor = ptx.wgmma_descriptor(ptx.shared_address(words, 0), 16, 1024)
        start = min(warp, last_tile) * tile_words
        for i in range(sums_count):
            sums[i] = np.float32(0.0)
        for group in range(groups):
            cuda.syncthreads()
            for i in range(thread, x_words, 256):
                words[i] = x[group * x_words + i]
            if thread < tokens:
                words[x_words + thread] = x[scales_start + group * tokens + thread]
            at = slot + warp * FP8_TILE_WORDS
            for i in range(lane, GROUP_WORDS, 32):
                words[at + i] = weights[start + codes_at(group, i // 256, i // 128 % 2) + i % 128]
            if lane < 16:
                source = start + scale_at(group, lane // 4 * chunk_rows) + lane % 4
                words[at + GROUP_WORDS + lane] = weights[source]
            ptx.fence_async_shared()
            cuda.syncthreads()
            read_fragments(words, at, lane, a)
            w0, w1 = read_scales(words, at, lane)
            for number in range(passes):
                start_pass(products, a, words, descriptor, number)
                wait(products)
                promote(sums, products, words, x_words, lane, w0, w1, number)
        row, token = warp * 16 + (lane >> 2), (lane & 3) * 2
        for j in range(tokens // 8):
            for i in range(4):
                y[(8 * j + token + i % 2) * 128 + row + i // 2 * 8] = sums[4 * j + i]

    return group_by_group


def check_group_products(layout: PrepackedLayout, tokens: int) -> None:
    """The main loop's arithmetic: fragments, order of K, both scales, promotion."""
    rng = generator(layout.out_features, layout.in_features, tokens)
    plan = GemmPlan(layout, ActivationTiles(layout.in_features, tokens, 8), tokens, 1, 1)
    codes, scales = weights(layout, rng)
    x = rng.standard_normal((tokens, layout.in_features)) * np.exp2(rng.integers(-6, 6, (tokens, 1)))
    x_words, y = plan.x.pack(x.astype(np.float32)), poisoned(tokens * 128)
    shared = 4 * tokens * (BLOCK_WORDS + 1) + 4 * FP8_SLOT_WORDS
    launch(group_by_group_kernel(plan), 1, 256, shared, prepack_reference(codes, scales, layout), x_words, y)
    expected = plan.x.unpack(x_words).astype(np.float64) @ dequantize_groups(codes, scales).astype(np.float64).T
    within(
        "FP8 GEMM, group by group", relative_error(y.reshape(tokens, 128)[:, : layout.out_features], expected), LIMIT
    )


@dataclass(frozen=True)
class Fp8GemmCase:
    """A projection whose CTAs walk over tiles, and share some of them along K.

    Attributes:
        token_tiles: that are computed, of `capacity` tokens that the arrays have.
        passes: in which a tile is multiplied, in the simulator.
    """

    kind: str
    out_features: int
    in_features: int
    tile_tokens: int
    token_tiles: int
    capacity: int
    ctas: int
    stages: int = 2
    k_tile: int = 0
    passes: int = 1

    @property
    def plan(self) -> GemmPlan:
        half = self.out_features // 2 if self.kind == "swiglu" else 0
        layout = PrepackedLayout(self.out_features, self.in_features, half, k_tile=self.k_tile)
        return GemmPlan(
            layout, ActivationTiles(self.in_features, self.capacity, 8), self.tile_tokens, self.stages, self.ctas
        )


GEMMS = (
    Fp8GemmCase("store", 130, 384, 16, 1, 24, ctas=1, passes=2),  # two tiles of rows: stages and phases go on
    Fp8GemmCase("swiglu", 140, 300, 16, 1, 16, ctas=3, stages=3),  # two tiles for three CTAs
    Fp8GemmCase("add", 128, 300, 8, 3, 24, ctas=2, k_tile=2),  # 3 tiles of 3 groups for 2 CTAs: the third is shared
)


def check_gemm_fp8(case: Fp8GemmCase) -> None:
    """Every element of the tokens that are computed and no other; a padding token of NaN stays alone."""
    rng, plan = generator(case.out_features, case.in_features, case.tile_tokens), case.plan
    codes, scales = weights(plan.layout, rng)
    scales[1, 0] = 0.0
    x = rng.standard_normal((case.capacity, case.in_features)) * np.exp2(rng.integers(-3, 3, (case.capacity, 1)))
    words, done = plan.x.pack(x.astype(np.float32)), case.tile_tokens * case.token_tiles
    product = plan.x.unpack(words).astype(np.float64) @ dequantize_groups(codes, scales).astype(np.float64).T
    words[plan.x.scales_start + done - 1 :: case.capacity] = (
        0xFFFFFFFF  # NaN: scales of the last token that is computed
    )
    common: dict[str, Any] = {
        "weights": prepack_reference(codes, scales, plan.layout),
        "x": words,
        "partials": np.zeros(plan.partials, np.float32),
        "token_tiles": case.token_tiles,
    }
    before = rng.standard_normal(product.shape).astype(np.float32)
    after, limit = before.copy(), LIMIT
    if case.kind == "store":
        run(case, make_gemm_store, gemm.GemmStoreArguments(**common, y=after.reshape(-1)))
    elif case.kind == "add":
        run(case, make_gemm_add, gemm.GemmAddArguments(**common, residual=after.reshape(-1)))
        product += before
    else:
        units = case.out_features // 2
        tiles = ActivationTiles(units, case.capacity)
        half = poisoned(tiles.words, dtype=np.uint32)
        run(case, make_gemm_swiglu, gemm.GemmSwigluArguments(**common, intermediate=half), intermediate=tiles)
        product = silu_reference(product[:, :units]) * product[:, units:]
        before, after, limit = before[:, :units], tiles.unpack(half), LIMIT + 5e-4
    assert np.isnan(after[done - 1]).all()
    within(f"FP8 GEMM, {case.kind}", relative_error(after[: done - 1], product[: done - 1]), limit)
    if case.kind != "swiglu":
        np.testing.assert_array_equal(after[done:], before[done:], "wrote tokens beyond the last")
    assert not common["partials"].any(), "partial sums are not zero for the next launch"


def run(case: Fp8GemmCase, factory: Any, arguments: Any, **options: Any) -> None:
    spec = gemm_kernel("gemm", factory, case.plan, dependent=False, **options).spec
    launch(spec.make(), case.ctas, spec.threads, spec.shared_bytes, arguments)
