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

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES
from numba_atomflow.ops.cuda.layout.weights import make_offsets

K_STEPS = 4  # instructions of a group
A_WORDS = 16  # of a group, in a thread


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


def make_load_weights(plan: GemmPlan) -> tuple[Any, Any]:
    """Device functions of a lane's part of a prepacked tile that begins at word `start`.

    Returns:
        load_codes (weights, start, group, lane, a): the A fragments of a group's k-steps, four words each.
        load_scales (weights, start, group, lane) -> the scales of rows g and g + 8.
    """
    codes_at, scale_at = make_offsets(plan.layout)
    scale_pairs = not plan.layout.split_rows  # rows g and g + 8 are neighbours

    @ptx.device_function
    def load_codes(weights, start, group, lane, a):
        for part in range(2):
            for half in range(2):
                words = ptx.load_stream_16(weights, start + codes_at(group, part, half) + lane * 4)
                for i in range(4):
                    a[8 * part + 4 * (i // 2) + 2 * (i % 2) + half] = words[i]

    @ptx.device_function
    def load_scales(weights, start, group, lane):
        at = start + scale_at(group, lane >> 2)
        if scale_pairs:
            return ptx.load_constant_f32x2(weights, at)
        return ptx.load_constant_f32(weights, at), ptx.load_constant_f32(
            weights, start + scale_at(group, 8 + (lane >> 2))
        )

    return load_codes, load_scales


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
