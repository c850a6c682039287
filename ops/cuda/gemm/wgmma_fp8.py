"""FP8 GEMM on sm_90: E4M3 weights times E4M3 activations (W8A8), by `wgmma` m64nNk32, sums promoted once per group.

Of a group of 128 along K (one stage of the pipeline, four instructions) the tensor cores compute the products of bare
codes from zero; then float32 instructions add them to the sums: sums += products * (weight scale * activation scale).
So neither scale is rounded, and no sum of the tensor cores is longer than 128 products: Hopper's FP8 tensor cores align
products to the largest of an instruction and keep some 14 bits (DeepSeek-V3 Technical Report, 3.3.2), which loses a
relative 1.3e-4 over 128 products and 2e-3 over 8,192 (`scripts/fp8_activations.py --sums`).

The weights' words are the A fragments as they are: lane 4 g + t loads K 16 t to 16 t + 15 of 64, four words, and k-step
s of 32 takes words 2 (s % 2) and 2 (s % 2) + 1 of half s // 2, for rows g and g + 8. X is tiled in that order.

Cost model, per group and SM. Tensor cores: 512 cycles for 128 x 128 x 128 at 4,096 products a cycle. Issue slots: a
consumer warp has 241 instructions for 128 tokens and 416 for 256, nine of them for each 8 tokens to promote, and a
scheduler has two such warps: 482 of 512 cycles, 832 of 1,024. One warpgroup promotes while the other multiplies. L2:
128 (128 + tile_tokens) bytes: 32 KB for 128 tokens, 48 KB for 256. At 132 SMs and 8 TB/s that is 0.53 and 0.80 us,
longer than the products take (0.29 and 0.58 us at 1.75 GHz): hence tiles of 256 tokens, whose sums leave registers for
32 accumulators, so that they are multiplied in four passes.
"""

from typing import Any, NamedTuple

from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import make_tile_writer, make_weights_start
from numba_atomflow.ops.cuda.gemm.epilogue import GemmEpilogue
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.gemm.weights import WeightLoads
from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES
from numba_atomflow.ops.cuda.scalars import f32, i32, u32, u64

K_STEPS = 4  # instructions of a group
A_WORDS = 16  # of a group, in a thread
_ZERO = f32(0.0)


def pass_tokens(tile_tokens: int) -> int:
    """Tokens of a tile that are multiplied at a time: N of the instruction.

    A thread has tile_tokens / 2 sums and half as many accumulators as a pass has tokens: 160 registers at most.
    """
    return min(tile_tokens, 64 if tile_tokens > 128 else 128)


@ptx.large_device_function
def arrange(codes, a):
    """A of the k-steps of a unit, four words each, from its codes as `WeightLoads.load` has them."""
    for step in range(K_STEPS):
        for half in range(2):
            for i in range(2):
                a[4 * step + 2 * i + half] = codes[8 * (step // 2) + 4 * half + 2 * (step % 2) + i]


class GroupProducts(NamedTuple):
    """Device functions of a warpgroup that multiply a group of a tile; between the two the first pass is under way.

    Attributes:
        begin: (products, a, words, x): issue the first pass. `products`: its accumulators; `a`: fragments; `words`: any
            view of shared memory; `x`: descriptor of the group's X tile.
        finish: (sums, products, a, words, x, scales, x_scales, lane, w0, w1): promote it, and multiply and promote the
            others. `scales`: word where the scales of the tile's tokens begin; `x_scales`: float32 registers, two for
            each 8 tokens of a pass; w0, w1: weight scales of rows g and g + 8.
    """

    begin: Any
    finish: Any


def make_group_products(tile_tokens: int) -> GroupProducts:
    """For tiles of so many tokens, in 1, 2 or 4 passes."""
    n = pass_tokens(tile_tokens)
    passes, pass_sums = tile_tokens // n, n // 2
    if passes not in {1, 2, 4}:
        raise ValueError(f"{tile_tokens} tokens are {passes} passes")
    accumulators = ptx.Registers(n // 2)
    first, second, third, fourth = (
        ptx.make_wgmma(n, a_first=4 * step, element="e4m3", accumulate=step > 0) for step in range(K_STEPS)
    )
    fence = ptx.make_wgmma_fence(accumulators, ptx.Registers(A_WORDS))
    wait = ptx.make_wgmma_wait(0, accumulators)
    pass_step = n * BLOCK_BYTES >> 4  # from a pass to the next, in a descriptor

    @ptx.large_device_function
    def issue(products, a, words, x, number):
        """Pass `number`."""
        x = u64(x + u64(number * pass_step))
        fence(products, a)
        first(products, a, words, x)
        second(products, a, words, u64(x + u64(ptx.K_STEP_WORDS)))
        third(products, a, words, u64(x + u64(2 * ptx.K_STEP_WORDS)))
        fourth(products, a, words, u64(x + u64(3 * ptx.K_STEP_WORDS)))
        ptx.wgmma_commit()
        ptx.sync_warp()  # no load is moved over it: ptxas would put those of `promote` between the instructions

    @ptx.large_device_function
    def promote(sums, products, words, scales, x_scales, lane, w0, w1, number):
        """Wait for pass `number`, and add it to its sums."""
        for j in range(n // 8):
            low, high = ptx.load_8(words, scales + number * n + 8 * j + (lane & 3) * 2)
            x_scales[2 * j], x_scales[2 * j + 1] = ptx.bits_f32(low), ptx.bits_f32(high)
        wait(products)
        for j in range(n // 8):
            i, at, x0, x1 = 4 * j, number * pass_sums + 4 * j, x_scales[2 * j], x_scales[2 * j + 1]
            sums[at] += products[i] * (x0 * w0)
            sums[at + 1] += products[i + 1] * (x1 * w0)
            sums[at + 2] += products[i + 2] * (x0 * w1)
            sums[at + 3] += products[i + 3] * (x1 * w1)

    @ptx.device_function
    def begin(products, a, words, x):
        issue(products, a, words, x, 0)

    @ptx.device_function
    def finish(sums, products, a, words, x, scales, x_scales, lane, w0, w1):
        promote(sums, products, words, scales, x_scales, lane, w0, w1, 0)
        if passes > 1:
            issue(products, a, words, x, 1)
            promote(sums, products, words, scales, x_scales, lane, w0, w1, 1)
        if passes > 2:
            issue(products, a, words, x, 2)
            promote(sums, products, words, scales, x_scales, lane, w0, w1, 2)
            issue(products, a, words, x, 3)
            promote(sums, products, words, scales, x_scales, lane, w0, w1, 3)

    return GroupProducts(begin, finish)


def make_fp8_consumer(
    plan: GemmPlan,
    schedule: Schedule,
    loads: WeightLoads,
    epilogue: GemmEpilogue,
    shared: Any,
    dependent: bool,
) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.

    Args:
        shared: `wgmma.Shared`.
    """
    if plan.layout.format.bits != 8 or plan.layout.format.converter != "cvt":
        raise ValueError(f"{plan.layout.format} has no E4M3 codes in their order along K")
    work, load, load_scales = schedule.work, loads.load, loads.load_scales
    weights_start = make_weights_start(plan)
    write, finish_tiles = make_tile_writer(plan, schedule, epilogue, shared.epilogue, shared.state)
    begin, finish = make_group_products(plan.tile_tokens)
    tile_tokens, stages, stage_bytes = plan.tile_tokens, plan.stages, 4 * plan.stage_words
    sums_count, accumulators, scales_at = tile_tokens // 2, pass_tokens(tile_tokens) // 2, shared.scales
    scale_count = accumulators // 2

    @ptx.large_device_function
    def load_unit(io, start, unit, lane, codes, scales):
        load(io.weights, start, unit, 0, lane, codes)
        load(io.weights, start, unit, 1, lane, codes)
        load_scales(io.weights, start, unit, lane, scales)

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums = cuda.local.array(sums_count, float32)
        products = cuda.local.array(accumulators, float32)
        x_scales = cuda.local.array(scale_count, float32)
        a, codes = cuda.local.array(A_WORDS, uint32), cuda.local.array(A_WORDS, uint32)
        scales = cuda.local.array(2, float32)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        stages_start = u32(ptx.shared_address(words, skipped))
        stage, phase, number, shared_from = i32(0), u32(0), i32(0), i32(-1)
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
                products[i] = _ZERO
            unit = first
            while unit < last:
                arrange(codes, a)
                w0, w1 = scales[0], scales[1]
                ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
                x = ptx.wgmma_descriptor(u32(stages_start + u32(stage) * u32(stage_bytes)), 16, ptx.SWIZZLE_ATOM_BYTES)
                unit = i32(unit + 1)  # that is loaded; the one before is multiplied
                ahead_start, ahead = start if unit < last else next_start, unit if unit < last else next_first
                # Before `begin`: what is loaded while wgmma is under way must not become a register of A (ptxas C7513).
                load_unit(io, ahead_start, ahead, lane, codes, scales)
                begin(products, a, words, x)
                x_scales_at = i32(skipped + i32(scales_at) + stage * i32(tile_tokens))
                finish(sums, products, a, words, x, x_scales_at, x_scales, lane, w0, w1)
                ptx.sync_warp()  # all lanes have read the scales
                if lane == 0:
                    ptx.barrier_arrive(barriers, u32(empty + u32(8) * u32(stage)))
                stage = i32(stage + 1)
                if stage == stages:
                    stage, phase = i32(0), u32(phase ^ u32(1))
            shared_from = write(io, words, skipped, i32(number - 1), shared_from, tile, first, last, sums, thread)
            tile, first, last, start = next_tile, next_first, next_last, next_start
        finish_tiles(io, words, skipped, shared_from, thread)

    return consume
