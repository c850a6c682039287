"""FP8 GEMM on sm_90: E4M3 weights times E4M3 activations (W8A8), by `wgmma` m64nNk32, sums promoted once per group.

Of a group of 128 along K (one stage of the pipeline, four instructions) the tensor cores compute the products of bare
codes from zero; then float32 instructions add them to the sums: sums += products * (weight scale * activation scale).
So neither scale is rounded, and no sum of the tensor cores is longer than 128 products: Hopper's FP8 tensor cores align
products to the largest of an instruction and keep some 14 bits (DeepSeek-V3 Technical Report, 3.3.2), which loses a
relative 1.3e-4 over 128 products and 2e-3 over 8,192 (`scripts/fp8_activations.py --sums`).

The weights' words are the A fragments as they are: lane 4 g + t loads K 16 t to 16 t + 15 of 64, four words, and k-step
s of 32 takes words 2 (s % 2) and 2 (s % 2) + 1 of half s // 2, for rows g and g + 8. X is tiled in that order.

Cost model: 256 threads take 128 float32 operations each to promote a group of 128 x 128 x 128, some 330 cycles with
loads, which overlap with the other warpgroup's 256 cycles of tensor cores.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import make_weights_start, make_write_tile
from numba_atomflow.ops.cuda.gemm.epilogue import GemmEpilogue
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.gemm.weights import WeightLoads
from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

K_STEPS = 4  # instructions of a group
A_WORDS = 16  # of a group, in a thread
_ZERO = f32(0.0)


@dataclass(frozen=True)
class Passes:
    """How a tile's tokens are split over the accumulators: a pass multiplies `tokens` of them by the group's weights.

    Attributes:
        tokens: of a pass: N of the instruction.
        count: passes of a tile.
        sets: of accumulators: with two, a pass is promoted while the next is multiplied.
    """

    tokens: int
    count: int
    sets: int


def choose_passes(tile_tokens: int) -> Passes:
    """Registers of a thread: tile_tokens / 2 sums and sets * tokens / 2 accumulators, 160 at most."""
    if tile_tokens <= 128:
        return Passes(tile_tokens, 1, 1)
    return Passes(64, tile_tokens // 64, 1)


@ptx.device_function
def arrange(codes, a):
    """A of the k-steps of a unit, four words each, from its codes as `WeightLoads.load` has them."""
    for step in range(K_STEPS):
        for half in range(2):
            for i in range(2):
                a[4 * step + 2 * i + half] = codes[8 * (step // 2) + 4 * half + 2 * (step % 2) + i]


def make_promote(first: int, tokens: int) -> Any:
    """Device function (sums, products, words, scales, t, w0, w1): sums += products * scales, for tokens `first` to
    `first` + `tokens` - 1 of the tile.

    Arguments: words, view of shared memory; scales: word where the tile's activation scales begin; t: lane in its quad;
    w0, w1: weight scales of rows g and g + 8.
    """

    @ptx.device_function
    def promote(sums, products, words, scales, t, w0, w1):
        for j in range(tokens // 8):
            low, high = ptx.load_8(words, scales + first + 8 * j + 2 * t)
            x0, x1 = ptx.bits_f32(low), ptx.bits_f32(high)
            at = first // 2 + 4 * j
            sums[at] += products[4 * j] * (x0 * w0)
            sums[at + 1] += products[4 * j + 1] * (x1 * w0)
            sums[at + 2] += products[4 * j + 2] * (x0 * w1)
            sums[at + 3] += products[4 * j + 3] * (x1 * w1)

    return promote


def make_multiply_group(passes: Passes) -> Any:
    """Device function (sums, products, more, a, words, descriptor, scales, t, w0, w1): one group of a tile.

    Arguments: products, more: arrays of the accumulators of a pass (`more` is used with two sets); a: fragments;
    descriptor: of the group's X tile; others as in `make_promote`. Every thread of a warpgroup calls it.
    """
    n, count, sets = passes.tokens, passes.count, passes.sets
    accumulators = ptx.Registers(n // 2)
    first, second, third, fourth = (
        ptx.make_wgmma(n, a_first=4 * step, element="e4m3", accumulate=step > 0) for step in range(K_STEPS)
    )
    fence = ptx.make_wgmma_fence(accumulators, ptx.Registers(A_WORDS))
    wait_all, wait_one = ptx.make_wgmma_wait(0, accumulators), ptx.make_wgmma_wait(1, accumulators)
    pass_step = np.uint64(n * BLOCK_BYTES >> 4)  # from a pass to the next, in a descriptor
    promotes = [make_promote(p * n, n) for p in range(4)]
    promote_0, promote_1, promote_2, promote_3 = promotes
    step_1, step_2, step_3 = (np.uint64(ptx.K_STEP_WORDS * step) for step in range(1, K_STEPS))

    @ptx.device_function
    def issue(products, a, words, descriptor):
        fence(products, a)
        first(products, a, words, descriptor)
        second(products, a, words, np.uint64(descriptor + step_1))
        third(products, a, words, np.uint64(descriptor + step_2))
        fourth(products, a, words, np.uint64(descriptor + step_3))
        ptx.wgmma_commit()

    @ptx.device_function
    def one_pass(sums, products, more, a, words, descriptor, scales, t, w0, w1):
        issue(products, a, words, descriptor)
        wait_all(products)
        promote_0(sums, products, words, scales, t, w0, w1)

    @ptx.device_function
    def one_set(sums, products, more, a, words, descriptor, scales, t, w0, w1):
        one_pass(sums, products, more, a, words, descriptor, scales, t, w0, w1)
        issue(products, a, words, np.uint64(descriptor + pass_step))
        wait_all(products)
        promote_1(sums, products, words, scales, t, w0, w1)
        if count == 4:
            issue(products, a, words, np.uint64(descriptor + np.uint64(2) * pass_step))
            wait_all(products)
            promote_2(sums, products, words, scales, t, w0, w1)
            issue(products, a, words, np.uint64(descriptor + np.uint64(3) * pass_step))
            wait_all(products)
            promote_3(sums, products, words, scales, t, w0, w1)

    @ptx.device_function
    def two_sets(sums, products, more, a, words, descriptor, scales, t, w0, w1):
        issue(products, a, words, descriptor)
        issue(more, a, words, np.uint64(descriptor + pass_step))
        wait_one(products)
        promote_0(sums, products, words, scales, t, w0, w1)
        if count == 4:
            issue(products, a, words, np.uint64(descriptor + np.uint64(2) * pass_step))
            wait_one(more)
            promote_1(sums, more, words, scales, t, w0, w1)
            issue(more, a, words, np.uint64(descriptor + np.uint64(3) * pass_step))
            wait_one(products)
            promote_2(sums, products, words, scales, t, w0, w1)
            wait_all(more)
            promote_3(sums, more, words, scales, t, w0, w1)
        else:
            wait_all(more)
            promote_1(sums, more, words, scales, t, w0, w1)

    if count not in {1, 2, 4} or sets > min(2, count):
        raise ValueError(f"{passes}: 1, 2 or 4 passes, and as many sets at most")
    return one_pass if count == 1 else one_set if sets == 1 else two_sets


def make_fp8_consumer(
    plan: GemmPlan,
    schedule: Schedule,
    loads: WeightLoads,
    epilogue: GemmEpilogue,
    shared: Any,
    dependent: bool,
    passes: Passes | None = None,
) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.

    Args:
        shared: `wgmma.Shared`.
    """
    if plan.layout.format.bits != 8 or plan.layout.format.converter != "cvt":
        raise ValueError(f"{plan.layout.format} has no E4M3 codes in their order along K")
    passes = passes or choose_passes(plan.tile_tokens)
    work, load, load_scales = schedule.work, loads.load, loads.load_scales
    weights_start = make_weights_start(plan)
    write_tile = make_write_tile(plan, schedule, epilogue, shared.epilogue, shared.flag)
    multiply_group = make_multiply_group(passes)
    tile_tokens, stages, stage_bytes = plan.tile_tokens, plan.stages, 4 * plan.stage_words
    sums_count, accumulators, scales_at = tile_tokens // 2, passes.tokens // 2, shared.scales

    @ptx.device_function
    def load_unit(io, start, unit, lane, codes, scales):
        load(io.weights, start, unit, 0, lane, codes)
        load(io.weights, start, unit, 1, lane, codes)
        load_scales(io.weights, start, unit, lane, scales)

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums = cuda.local.array(sums_count, float32)
        products, more = cuda.local.array(accumulators, float32), cuda.local.array(accumulators, float32)
        a, codes = cuda.local.array(A_WORDS, uint32), cuda.local.array(A_WORDS, uint32)
        scales = cuda.local.array(2, float32)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        stages_start = u32(ptx.shared_address(words, skipped))
        stage, phase, number = i32(0), u32(0), i32(0)
        tile, first, last = work(number, io.token_tiles)
        start = weights_start(tile if tile > 0 else i32(0), warp, io.token_tiles)
        if tile >= 0:
            load_unit(io, start, first, lane, codes, scales)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        while tile >= 0:
            number = i32(number + 1)
            next_tile, next_first, next_last = work(number, io.token_tiles)
            next_start = weights_start(next_tile if next_tile > 0 else i32(0), warp, io.token_tiles)
            for i in range(sums_count):
                sums[i] = _ZERO
            for i in range(accumulators):  # so that they need no registers between tiles
                products[i], more[i] = _ZERO, _ZERO
            unit = first
            while unit < last:
                arrange(codes, a)
                w0, w1 = scales[0], scales[1]
                unit = i32(unit + 1)  # that is loaded; the one before is multiplied
                ahead_start, ahead = start if unit < last else next_start, unit if unit < last else next_first
                load_unit(io, ahead_start, ahead, lane, codes, scales)
                ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
                x = ptx.wgmma_descriptor(u32(stages_start + u32(stage) * u32(stage_bytes)), 16, ptx.SWIZZLE_ATOM_BYTES)
                x_scales = i32(skipped + i32(scales_at) + stage * i32(tile_tokens))
                multiply_group(sums, products, more, a, words, x, x_scales, lane & 3, w0, w1)
                ptx.sync_warp()  # all lanes have read the scales
                if lane == 0:
                    ptx.barrier_arrive(barriers, u32(empty + u32(8) * u32(stage)))
                stage = i32(stage + 1)
                if stage == stages:
                    stage, phase = i32(0), u32(phase ^ u32(1))
            write_tile(io, words, skipped, tile, first, last, sums, thread)
            tile, first, last, start = next_tile, next_first, next_last, next_start

    return consume
