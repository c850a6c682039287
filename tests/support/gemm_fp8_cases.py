"""The FP8 GEMM against float64: in the simulator, or on a GPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from kernel_cases import generator, launch, poisoned, relative_error, weights, within
from numba import cuda, float32, uint32
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.gemm.kernels import gemm_kernel, make_gemm_store
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.weights import make_weight_loads
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import A_WORDS, Passes, arrange, make_multiply_group
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_reference
from numba_atomflow.ops.fp8 import dequantize_groups

# Relative L2 of float32 sums: the twin of wgmma is exact; Hopper's FP8 sums have some 14 bits (predicted: 1.3e-4).
LIMIT = 1e-5 if ptx.SIMULATED else 1e-3


def group_by_group_kernel(plan: GemmPlan, passes: Passes) -> Any:
    """Kernel (weights, x, y): a CTA of two warpgroups has the only tile; y [tokens, 128]. No pipeline."""
    groups, tokens, tile_words = plan.layout.groups, plan.tile_tokens, plan.layout.tile_words
    x_words, scales_start, last_tile = tokens * BLOCK_WORDS, plan.x.scales_start, plan.layout.tiles - 1
    loads = make_weight_loads(plan.layout)
    load, load_scales = loads.load, loads.load_scales
    multiply = make_multiply_group(passes)
    accumulators, sums_count = passes.tokens // 2, tokens // 2

    @ptx.kernel(256, 1)
    def group_by_group(weights, x, y):
        words = cuda.shared.array(0, uint32)
        sums = cuda.local.array(sums_count, float32)
        products, more = cuda.local.array(accumulators, float32), cuda.local.array(accumulators, float32)
        a, codes = cuda.local.array(A_WORDS, uint32), cuda.local.array(A_WORDS, uint32)
        w = cuda.local.array(2, float32)
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
            ptx.fence_async_shared()
            cuda.syncthreads()
            load(weights, start, group, 0, lane, codes)
            load(weights, start, group, 1, lane, codes)
            load_scales(weights, start, group, lane, w)
            arrange(codes, a)
            multiply(sums, products, more, a, words, descriptor, x_words, lane & 3, w[0], w[1])
        row, token = warp * 16 + (lane >> 2), (lane & 3) * 2
        for j in range(tokens // 8):
            for i in range(4):
                y[(8 * j + token + i % 2) * 128 + row + i // 2 * 8] = sums[4 * j + i]

    return group_by_group


def check_multiply_group(layout: PrepackedLayout, passes: Passes) -> None:
    """The main loop's arithmetic: fragments, order of K, both scales, promotion."""
    rng = generator(layout.out_features, layout.in_features, passes.tokens)
    tokens = passes.tokens * passes.count
    plan = GemmPlan(layout, ActivationTiles(layout.in_features, tokens, 8), tokens, 1, 1)
    codes, scales = weights(layout, rng)
    x = rng.standard_normal((tokens, layout.in_features)) * np.exp2(rng.integers(-6, 6, (tokens, 1)))
    x_words, y = plan.x.pack(x.astype(np.float32)), poisoned(tokens * 128)
    shared = 4 * tokens * (BLOCK_WORDS + 1)
    launch(group_by_group_kernel(plan, passes), 1, 256, shared, prepack_reference(codes, scales, layout), x_words, y)
    expected = plan.x.unpack(x_words).astype(np.float64) @ dequantize_groups(codes, scales).astype(np.float64).T
    within(
        "FP8 GEMM, group by group", relative_error(y.reshape(tokens, 128)[:, : layout.out_features], expected), LIMIT
    )


@dataclass(frozen=True)
class Fp8GemmCase:
    """A projection whose CTAs walk over tiles, and share some of them along K.

    Attributes:
        capacity: tokens of the buffer of X; token_tiles: that are computed.
    """

    out_features: int
    in_features: int
    tile_tokens: int
    token_tiles: int
    capacity: int
    ctas: int
    stages: int = 2
    fixup_units: int = 0
    k_tile: int = 0
    half: int = 0

    @property
    def plan(self) -> GemmPlan:
        layout = PrepackedLayout(self.out_features, self.in_features, self.half, k_tile=self.k_tile)
        x = ActivationTiles(self.in_features, self.capacity, 8)
        return GemmPlan(layout, x, self.tile_tokens, self.stages, self.ctas, self.fixup_units)

    @property
    def tokens(self) -> int:
        return self.tile_tokens * self.token_tiles


GEMMS = (
    Fp8GemmCase(130, 384, 16, 1, 24, ctas=1),  # two tiles of rows one after the other: stages and phases go on
    Fp8GemmCase(128, 520, 8, 3, 24, ctas=2, k_tile=4),  # 3 tiles of 5 groups for 2 CTAs: the third is shared
    Fp8GemmCase(100, 300, 16, 1, 16, ctas=3, stages=3),  # a tile for three CTAs
)


def operands(case: Fp8GemmCase) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """The arguments that all epilogues have, and X W^T of the tokens that are computed; the others are NaN."""
    rng, plan = generator(case.out_features, case.in_features, case.tile_tokens), case.plan
    codes, scales = weights(plan.layout, rng)
    x = rng.standard_normal((case.capacity, case.in_features)) * np.exp2(rng.integers(-6, 6, (case.capacity, 1)))
    words = plan.x.pack(x.astype(np.float32))
    product = plan.x.unpack(words).astype(np.float64) @ dequantize_groups(codes, scales).astype(np.float64).T
    common = {
        "weights": prepack_reference(codes, scales, plan.layout),
        "x": words,
        "partials": poisoned(plan.partials),
        "counters": np.zeros(plan.counters, np.uint32),
        "token_tiles": case.token_tiles,
    }
    return common, product[: case.tokens]


def check_gemm_fp8(case: Fp8GemmCase) -> None:
    """Store: every element of the tokens that are computed and no other; counters are 0 again."""
    common, product = operands(case)
    y = poisoned(case.capacity * case.out_features)
    spec = gemm_kernel("store", make_gemm_store, case.plan, dependent=False).spec
    launch(spec.make(), case.ctas, spec.threads, spec.shared_bytes, gemm.GemmStoreArguments(**common, y=y))
    got = y.reshape(case.capacity, -1)
    within("FP8 GEMM", relative_error(got[: case.tokens], product), LIMIT)
    assert np.isnan(got[case.tokens :]).all(), "wrote tokens beyond the last"
    assert not common["counters"].any()
