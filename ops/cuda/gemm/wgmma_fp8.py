"""FP8 GEMM on sm_90: E4M3 weights times E4M3 activations (W8A8), by `wgmma` m64nNk32, sums promoted once per group.

Of a group of 128 along K (one stage of the pipeline, four instructions) the tensor cores compute the products of bare
codes from zero; then float32 instructions add them to the sums: sums += products * (weight scale * activation scale).
So neither scale is rounded, and no sum of the tensor cores is longer than 128 products: Hopper's FP8 tensor cores align
products to the largest of an instruction and keep some 14 bits (DeepSeek-V3 Technical Report, 3.3.2), which loses a
relative 1.3e-4 over 128 products and 2e-3 over 8,192 (`scripts/fp8_activations.py --sums`).

The weights' words are the A fragments as they are: lane 4 g + t loads K 16 t to 16 t + 15 of 64, four words, and k-step
s of 32 takes words 2 (s % 2) and 2 (s % 2) + 1 of half s // 2, for rows g and g + 8. X is tiled in that order. A stage
of the pipeline holds the weights, too, as they are in memory, so that a group's are in registers only while it is
multiplied. The three warps of the producer's warpgroup that do not copy X copy them (`weight_copies.py`).

Order of a group: tiles of more than 128 tokens are multiplied in two passes, for whose halves there are accumulators. A
warpgroup waits for a pass, and adds it while the other warpgroup's is multiplied. With that of the last pass it reads
the next group's weights.

Cost model, per group and SM, for 256 tokens. Tensor cores: 1,024 cycles for 128 x 256 x 128 at 4,096 products a cycle.
Issue slots: a consumer warp has some 400 instructions, 256 of which multiply and add; a scheduler has two such warps
and one that copies: 880. L2: 128 (128 + 256) bytes and scales, 50 KB: at 132 SMs and 7 TB/s 0.93 us, longer than the
products take (0.58 us at 1.75 GHz). Measured: 1.06 us; 0.86 with a quarter of the promotion.
"""

from typing import Any, NamedTuple

from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import make_tile_writer
from numba_atomflow.ops.cuda.gemm.epilogue import GemmEpilogue
from numba_atomflow.ops.cuda.gemm.plan import FP8_SLOT_WORDS, FP8_TILE_WORDS, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule
from numba_atomflow.ops.cuda.gemm.weight_copies import make_read_scales
from numba_atomflow.ops.cuda.layout.activations import BLOCK_BYTES
from numba_atomflow.ops.cuda.scalars import f32, i32, u32, u64

K_STEPS = 4  # instructions of a group
A_WORDS = 16  # of a group, in a thread
_ZERO = f32(0.0)


def pass_tokens(tile_tokens: int) -> int:
    """Tokens of a tile that are multiplied at a time: N of the instruction.

    A thread has tile_tokens / 2 sums and half as many accumulators as a pass has tokens: 192 registers at most.
    """
    return tile_tokens if tile_tokens <= 128 else tile_tokens // 2


class GroupProducts(NamedTuple):
    """Device functions of a warpgroup that multiply a group of a tile, and add the products, times scales, to sums.

    `products`: accumulators; `words`: any view of shared memory; `number`: of the pass.

    Attributes:
        start: (products, a, words, x, number): issue a pass. `a`: fragments; `x`: descriptor of the group's X tile.
        wait: (products): for it.
        promote: (sums, products, words, scales, lane, w0, w1, number): add it to its sums. `scales`: word where the
            scales of the tile's tokens begin; w0, w1: weight scales of rows g and g + 8.
        passes: of a tile: 1 or 2.
    """

    start: Any
    wait: Any
    promote: Any
    passes: int


def make_group_products(tile_tokens: int) -> GroupProducts:
    """For tiles of so many tokens."""
    n = pass_tokens(tile_tokens)
    passes, pass_sums = tile_tokens // n, n // 2
    if passes not in {1, 2}:
        raise ValueError(f"{tile_tokens} tokens are {passes} passes")
    accumulators = ptx.Registers(n // 2)
    first, second, third, fourth = (
        ptx.make_wgmma(n, a_first=4 * step, element="e4m3", accumulate=step > 0) for step in range(K_STEPS)
    )
    fence = ptx.make_wgmma_fence(accumulators, ptx.Registers(A_WORDS))
    wait = ptx.make_wgmma_wait(0, accumulators)
    pass_step = n * BLOCK_BYTES >> 4  # from a pass to the next, in a descriptor

    @ptx.large_device_function
    def start(products, a, words, x, number):
        x = u64(x + u64(number * pass_step))
        fence(products, a)
        first(products, a, words, x)
        second(products, a, words, u64(x + u64(ptx.K_STEP_WORDS)))
        third(products, a, words, u64(x + u64(2 * ptx.K_STEP_WORDS)))
        fourth(products, a, words, u64(x + u64(3 * ptx.K_STEP_WORDS)))
        ptx.wgmma_commit()
        ptx.sync_warp()  # no load is moved over it: ptxas would put those of `promote` between the instructions

    @ptx.large_device_function
    def promote(sums, products, words, scales, lane, w0, w1, number):
        for j in range(n // 8):
            low, high = ptx.load_8(words, scales + number * n + 8 * j + (lane & 3) * 2)
            i, at, x0, x1 = 4 * j, number * pass_sums + 4 * j, ptx.bits_f32(low), ptx.bits_f32(high)
            sums[at] += products[i] * (x0 * w0)
            sums[at + 1] += products[i + 1] * (x1 * w0)
            sums[at + 2] += products[i + 2] * (x0 * w1)
            sums[at + 3] += products[i + 3] * (x1 * w1)

    return GroupProducts(start, wait, promote, passes)


@ptx.large_device_function
def read_fragments(words, at, lane, a):
    """A warp's A fragments of a unit: of a prepacked tile whose slot of shared memory begins at word `at`."""
    for block in range(2):
        for half in range(2):
            w0, w1, w2, w3 = ptx.load_shared_16(words, at + 128 * (2 * block + half) + lane * 4)
            i = 8 * block + half
            a[i], a[i + 2], a[i + 4], a[i + 6] = w0, w1, w2, w3


def make_fp8_consumer(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, shared: Any, dependent: bool) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.

    Args:
        shared: `wgmma.Shared`.
    """
    if plan.layout.format.bits != 8 or plan.layout.format.converter != "cvt":
        raise ValueError(f"{plan.layout.format} has no E4M3 codes in their order along K")
    work, read_scales = schedule.work, make_read_scales(plan.layout)
    write, finish_tiles = make_tile_writer(plan, schedule, epilogue, shared.epilogue)
    start, wait, promote, passes = make_group_products(plan.tile_tokens)
    tile_tokens, stages, stage_bytes = plan.tile_tokens, plan.stages, 4 * plan.stage_words
    sums_count, accumulators, scales_at = tile_tokens // 2, pass_tokens(tile_tokens) // 2, shared.scales
    slot_words, weights_at = FP8_SLOT_WORDS, shared.weights

    @ptx.device_function
    def weights_of(skipped, stage, warp):
        return i32(skipped + i32(weights_at) + stage * i32(slot_words) + warp * i32(FP8_TILE_WORDS))

    @ptx.device_function
    def x_of(stages_start, stage):
        return ptx.wgmma_descriptor(u32(stages_start + u32(stage) * u32(stage_bytes)), 16, ptx.SWIZZLE_ATOM_BYTES)

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums, products = cuda.local.array(sums_count, float32), cuda.local.array(accumulators, float32)
        a = cuda.local.array(A_WORDS, uint32)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        stages_start = u32(ptx.shared_address(words, skipped))
        scales_start = i32(skipped + i32(scales_at))
        stage, phase, number, shared_from = i32(0), u32(0), i32(0), i32(-1)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        tile, first, last = work(number, io.token_tiles)
        while tile >= 0:
            for i in range(sums_count):
                sums[i] = _ZERO
            for i in range(accumulators):  # so that they need no registers between tiles
                products[i] = _ZERO
            ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
            read_fragments(words, weights_of(skipped, stage, warp), lane, a)
            unit = first
            while unit < last:
                unit = i32(unit + 1)
                now, x = stage, x_of(stages_start, stage)
                w0, w1 = read_scales(words, weights_of(skipped, stage, warp), lane)
                x_scales = i32(scales_start + stage * i32(tile_tokens))
                start(products, a, words, x, 0)
                if passes == 2:
                    wait(products)
                    promote(sums, products, words, x_scales, lane, w0, w1, 0)
                    start(products, a, words, x, 1)
                stage = i32(stage + 1)
                if stage == stages:
                    stage, phase = i32(0), u32(phase ^ u32(1))
                if unit < last:
                    ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
                wait(products)
                following = stage if unit < last else now  # a branch would keep it from what follows
                read_fragments(words, weights_of(skipped, following, warp), lane, a)
                promote(sums, products, words, x_scales, lane, w0, w1, passes - 1)
                ptx.sync_warp()  # all lanes have read the scales
                if lane == 0:
                    ptx.barrier_arrive(barriers, u32(empty + u32(8) * u32(now)))
            shared_from = write(io, words, skipped, number, shared_from, tile, first, last, sums, thread)
            number = i32(number + 1)
            tile, first, last = work(number, io.token_tiles)
        finish_tiles(io, words, skipped, shared_from, thread)

    return consume
