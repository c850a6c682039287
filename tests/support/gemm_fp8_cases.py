"""The FP8 GEMM against float64: in the simulator, or on a GPU."""

from typing import Any

import numpy as np
from kernel_cases import generator, launch, poisoned, relative_error, weights, within
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import A_WORDS, Passes, make_load_weights, make_multiply_group
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS, ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout, prepack_reference
from numba_atomflow.ops.fp8 import dequantize_groups

# Relative L2 of float32 sums: the twin of wgmma is exact; Hopper's FP8 sums have some 14 bits (predicted: 1.3e-4).
LIMIT = 1e-5 if ptx.SIMULATED else 1e-3


def group_by_group_kernel(plan: GemmPlan, passes: Passes) -> Any:
    """Kernel (weights, x, y): a CTA of two warpgroups has the only tile; y [tokens, 128]. No pipeline."""
    groups, tokens, tile_words = plan.layout.groups, plan.tile_tokens, plan.layout.tile_words
    x_words, scales_start, last_tile = tokens * BLOCK_WORDS, plan.x.scales_start, plan.layout.tiles - 1
    load_codes, load_scales = make_load_weights(plan)
    multiply = make_multiply_group(passes)
    accumulators, sums_count = passes.tokens // 2, tokens // 2

    @ptx.kernel(256, 1)
    def group_by_group(weights, x, y):
        words = cuda.shared.array(0, uint32)
        sums = cuda.local.array(sums_count, float32)
        products, more = cuda.local.array(accumulators, float32), cuda.local.array(accumulators, float32)
        a = cuda.local.array(A_WORDS, uint32)
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
            load_codes(weights, start, group, lane, a)
            w0, w1 = load_scales(weights, start, group, lane)
            multiply(sums, products, more, a, words, descriptor, x_words, lane & 3, w0, w1)
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
