"""The GEMM of sm_90: `wgmma` with FP8 weights that are converted in registers, warp-specialised and persistent.

A CTA's tile is 128 weight rows by `tile_tokens`. Two consumer warpgroups have 64 rows each, a warp one prepacked tile;
they load weights themselves, one unit ahead, and multiply them by X from shared memory. A producer warp copies X, whose
tiled order a plain bulk copy brings swizzled into a pipeline stage, and prefetches the weights of later units into L2.
It has a warpgroup of its own, because registers can only be given away by whole warpgroups.

Each stage has two mbarriers: `full` completes a phase when the bytes have arrived, `empty` when all consumer warps have
multiplied them. Stage n % stages waits for phase n // stages.

Scales. A is the bare codes. Between units (of one scale each) the accumulators are multiplied by s[u - 1] / s[u], after
the last one by its s: the sum over units of s times the unit's products, without a second set of accumulators. A unit
whose scale is 0 has no codes but 0, and takes the scale of the one before.

Order of a unit, per warpgroup: while the second block of the last unit is multiplied, convert the first block (its
registers of A are free), wait for X; wait for the products; rescale; start the first block; convert the second, whose
registers of A that wait freed; start it; wait until only it is under way. Loads of the next unit are issued as soon as
codes are converted. The order of additions of an element does not depend on `tile_tokens`.
"""

from typing import Any

from numba import cuda, float32, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.fixup import CONSUMER_BARRIER, make_fixup
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule, make_schedule
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, WeightLoads, make_weight_loads
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import make_fp8_consumer
from numba_atomflow.ops.cuda.scalars import f32, i32, u32, u64

THREADS = CONSUMERS + 128
ALIGNMENT = ptx.SWIZZLE_ATOM_BYTES
CONSUMER_WARPS = CONSUMERS // 32
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40
_L2_DISTANCE = 3  # units from the one whose X is copied to the one that is prefetched
_ZERO, _ONE = f32(0.0), f32(1.0)


class Shared:
    """Layout of shared memory, in words from the first multiple of `ALIGNMENT`: stages of X, their scales (FP8), the
    epilogue's stage, `full` and `empty` barriers, a flag.
    """

    def __init__(self, plan: GemmPlan, epilogue_words: int) -> None:
        self.scales = plan.stages * plan.stage_words
        self.epilogue = self.scales + plan.stages * plan.stage_scales
        self.full = self.epilogue + epilogue_words
        self.empty = self.full + 2 * plan.stages
        self.flag = self.empty + 2 * plan.stages
        self.bytes = 4 * (self.flag + 2) + ALIGNMENT


def wgmma_shared_bytes(plan: GemmPlan, epilogue: GemmEpilogue) -> int:
    """Dynamic shared memory of a CTA."""
    return Shared(plan, epilogue.stage_words).bytes


def make_gemm_wgmma(plan: GemmPlan, epilogue: GemmEpilogue, *, dependent: bool = False) -> Any:
    """A projection's kernel of `THREADS` threads. Its parameter `io` has `weights`, `x`, `partials`, `counters`,
    `token_tiles` and what the epilogue reads and writes.
    """
    schedule, loads, shared = make_schedule(plan), make_weight_loads(plan.layout), Shared(plan, epilogue.stage_words)
    produce = _make_producer(plan, schedule, loads, shared, dependent)
    make_consumer = make_fp8_consumer if plan.x.bits == 8 else _make_consumer
    consume = make_consumer(plan, schedule, loads, epilogue, shared, dependent)
    stages, full_at, empty_at, unaligned = plan.stages, shared.full // 2, shared.empty // 2, ALIGNMENT - 1
    fewer_registers = ptx.make_set_registers("dec", _PRODUCER_REGISTERS)
    more_registers = ptx.make_set_registers("inc", _CONSUMER_REGISTERS)

    @ptx.kernel(THREADS, 1)
    def gemm(io):
        words = cuda.shared.array(0, uint32)
        barriers = cuda.shared.array(0, uint64)
        thread = i32(cuda.threadIdx.x)
        address = u32(ptx.shared_address(words, 0))
        skipped = i32((u32(address + u32(unaligned)) & u32(~unaligned & 0xFFFFFFFF)) - address)  # bytes
        full = u32(address + u32(skipped) + u32(8 * full_at))
        empty = u32(address + u32(skipped) + u32(8 * empty_at))
        if thread == 0:
            for stage in range(stages):
                ptx.barrier_init(barriers, u32(full + u32(8 * stage)), u32(1))
                ptx.barrier_init(barriers, u32(empty + u32(8 * stage)), u32(CONSUMER_WARPS))
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread >= CONSUMERS:
            fewer_registers()
            if thread < CONSUMERS + 32:
                produce(io, words, barriers, u32(address + u32(skipped)), full, empty, i32(thread - CONSUMERS))
        else:
            more_registers()
            consume(io, words, barriers, i32(skipped >> 2), full, empty, thread)

    return gemm


def _make_producer(plan: GemmPlan, schedule: Schedule, loads: WeightLoads, shared: Shared, dependent: bool) -> Any:
    """Device function (io, words, barriers, stages_start, full, empty, lane): what the producer warp does.

    `stages_start`, `full`, `empty`: addresses of shared memory.
    """
    work, prefetch_unit = schedule.work, loads.prefetch
    tiles, tile_words, stages = plan.layout.tiles, plan.layout.tile_words, plan.stages
    stage_words, unit_blocks, block_words = plan.stage_words, plan.unit_blocks, plan.x.block_words
    stage_bytes, scale_bytes = 4 * stage_words, 4 * plan.stage_scales
    scales_at, scales_start, x_tokens, tile_tokens = (
        4 * shared.scales,
        plan.x.scales_start,
        plan.x.tokens,
        plan.tile_tokens,
    )

    @ptx.device_function
    def prefetch(io, lane, tile, unit, last):
        """A unit of the prepacked tiles of the 8 consumer warps, by 8 lanes."""
        if tile >= 0 and unit < last and lane < CONSUMER_WARPS:
            prepacked = min(i32(u32(tile) // u32(io.token_tiles)) * CONSUMER_WARPS + lane, tiles - 1)
            prefetch_unit(io.weights, prepacked * tile_words, unit)

    @ptx.device_function
    def produce(io, words, barriers, stages_start, full, empty, lane):
        stage, phase = i32(0), u32(0)
        number = i32(0)
        tile, first, last = work(number, io.token_tiles)
        for ahead in range(_L2_DISTANCE):
            prefetch(io, lane, tile, first + ahead, last)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        while tile >= 0:
            number = i32(number + 1)
            next_tile, next_first, next_last = work(number, io.token_tiles)
            token_tile = i32(u32(tile) % u32(io.token_tiles))
            source = first * unit_blocks * block_words + token_tile * stage_words
            scales = scales_start + first * x_tokens + token_tile * tile_tokens  # a K block of FP8 is a unit
            for unit in range(first, last):
                ahead = unit + _L2_DISTANCE
                prefetch(io, lane, tile, ahead, last)
                if ahead >= last:
                    prefetch(io, lane, next_tile, next_first + ahead - last, next_last)
                for _ in range(unit_blocks):
                    if lane == 0:
                        barrier = u32(full + u32(8) * u32(stage))
                        target = u32(stages_start + u32(stage) * u32(stage_bytes))
                        ptx.barrier_wait(barriers, u32(empty + u32(8) * u32(stage)), u32(phase ^ u32(1)))
                        ptx.barrier_arrive_expect(barriers, barrier, u32(stage_bytes + scale_bytes))
                        ptx.bulk_copy(words, target, io.x, source, u32(stage_bytes), barriers, barrier)
                        if scale_bytes:
                            target = u32(stages_start + u32(scales_at) + u32(stage) * u32(scale_bytes))
                            ptx.bulk_copy(words, target, io.x, scales, u32(scale_bytes), barriers, barrier)
                    source += block_words
                    scales += x_tokens
                    stage = i32(stage + 1)
                    if stage == stages:
                        stage, phase = i32(0), u32(phase ^ u32(1))
                ptx.sync_warp()
            tile, first, last = next_tile, next_first, next_last

    return produce


def _make_consumer(
    plan: GemmPlan, schedule: Schedule, loads: WeightLoads, epilogue: GemmEpilogue, shared: Shared, dependent: bool
) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.
    """
    work, units, fixup = schedule.work, plan.units, make_fixup(plan, schedule, CONSUMERS)
    load, load_scales, code_registers = loads.load, loads.load_scales, loads.code_registers
    tiles, tile_words, tile_tokens = plan.layout.tiles, plan.layout.tile_words, plan.tile_tokens
    sums_count, fragments = tile_tokens // 2, tile_tokens // 8
    store, flush, staged = epilogue.store, epilogue.flush, epilogue.stage_words > 0
    epilogue_at, flag_at = shared.epilogue, shared.flag
    begin, multiply_unit, finish = _make_multiply(plan, loads)

    @ptx.device_function
    def weights_start(tile, warp, token_tiles):
        """Word at which the prepacked tile of a warp begins; rows beyond the last tile repeat it, to be discarded."""
        return min(i32(u32(tile) // u32(token_tiles)) * CONSUMER_WARPS + warp, tiles - 1) * tile_words

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums = cuda.local.array(sums_count, float32)
        a, b = cuda.local.array(A_REGISTERS, uint32), cuda.local.array(A_REGISTERS, uint32)
        codes = cuda.local.array(code_registers, uint32)
        scales = cuda.local.array(2, float32)
        lane, warp = thread & 31, thread >> 5
        stages_start = u32(ptx.shared_address(words, skipped))
        stage, phase, before = i32(0), u32(0), i32(-1)
        number = i32(0)
        tile, first, last = work(number, io.token_tiles)
        start = weights_start(max(tile, 0), warp, io.token_tiles)
        if tile >= 0:
            load(io.weights, start, first, 0, lane, codes)
            load_scales(io.weights, start, first, lane, scales)
            load(io.weights, start, first, 1, lane, codes)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        while tile >= 0:
            number = i32(number + 1)
            next_tile, next_first, next_last = work(number, io.token_tiles)
            next_start = weights_start(max(next_tile, 0), warp, io.token_tiles)
            begin(sums)
            scale_0, scale_1 = _ZERO, _ZERO
            for unit in range(first, last):
                more = unit + 1 < last
                ahead_start, ahead = start if more else next_start, unit + 1 if more else next_first
                stage, phase, before, scale_0, scale_1 = multiply_unit(
                    io,
                    words,
                    barriers,
                    stages_start,
                    full,
                    empty,
                    stage,
                    phase,
                    before,
                    sums,
                    a,
                    b,
                    codes,
                    scales,
                    scale_0,
                    scale_1,
                    ahead_start,
                    ahead,
                    lane,
                )
            before = finish(barriers, empty, before, sums, codes, scale_0, scale_1, lane)
            whole = True
            if last - first < units:
                whole = fixup(io, words, skipped + flag_at, tile, sums, thread)
            if whole:
                row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
                token, prepacked = token_tile * tile_tokens, row_tile * CONSUMER_WARPS + warp
                stage_of_epilogue = words[skipped + epilogue_at :]
                if staged:
                    ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
                for j in range(fragments):
                    i = 4 * j
                    store(
                        io,
                        stage_of_epilogue,
                        prepacked,
                        lane,
                        token + 8 * j,
                        8 * j,
                        sums[i],
                        sums[i + 1],
                        sums[i + 2],
                        sums[i + 3],
                    )
                if staged:
                    ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMERS))
                    flush(io, stage_of_epilogue, row_tile, token, thread)
            tile, first, last, start = next_tile, next_first, next_last, next_start

    return consume


def _make_multiply(plan: GemmPlan, loads: WeightLoads) -> tuple[Any, Any, Any]:
    """Device functions of a warpgroup.

    begin: (sums): a tile's sums are 0.

    multiply_unit: (io, words, barriers, stages_start, full, empty, stage, phase, before, sums, a, b, codes, scales,
    scale_0, scale_1, ahead_start, ahead, lane) -> (stage, phase, before, scale_0, scale_1): start the products of the
    unit in `codes` and of X in the next two stages; load unit `ahead` of the tile that begins at `ahead_start`.
    `before`: the stage that a batch which may be under way reads, or -1. scale_0, scale_1: that the sums are yet to be
    multiplied by; 0: there are none.

    finish: (barriers, empty, before, sums, codes, scale_0, scale_1, lane) -> -1: wait for all products; scale them.
    """
    sums_count, stages, stage_bytes = plan.tile_tokens // 2, plan.stages, 4 * plan.stage_words
    load, load_scales, convert, half = loads.load, loads.load_scales, loads.convert, loads.code_registers // 2
    scaled = plan.layout.format.scaled
    step_0, step_1, step_2, step_3 = (ptx.make_wgmma(plan.tile_tokens, a_first=4 * step) for step in range(4))
    all_sums, all_a = ptx.Registers(sums_count), ptx.Registers(A_REGISTERS)
    fence_sums, fence_a = ptx.make_wgmma_fence(all_sums), ptx.make_wgmma_fence(all_a)
    fence_both = ptx.make_wgmma_fence(all_sums, all_a)
    # What is converted next goes into registers that a batch was reading: codes are tied to the wait for it.
    wait_all = ptx.make_wgmma_wait(0, all_sums, ptx.Registers(half, half))
    wait_before_second = ptx.make_wgmma_wait(1, ptx.Registers(half, half))
    wait_before_first = ptx.make_wgmma_wait(1, ptx.Registers(half))

    @ptx.device_function
    def release(barriers, empty, stage, lane):
        """The stage has been multiplied by this warp."""
        if stage >= 0 and lane == 0:
            ptx.barrier_arrive(barriers, u32(empty + u32(8) * u32(stage)))

    @ptx.device_function
    def start_products(words, sums, a, stages_start, stage):
        """A K block: a batch of four k-steps."""
        x = ptx.wgmma_descriptor(u32(stages_start + u32(stage) * u32(stage_bytes)), 16, ptx.SWIZZLE_ATOM_BYTES)
        step_0(sums, a, words, x)
        step_1(sums, a, words, u64(x + u64(ptx.K_STEP_WORDS)))
        step_2(sums, a, words, u64(x + u64(2 * ptx.K_STEP_WORDS)))
        step_3(sums, a, words, u64(x + u64(3 * ptx.K_STEP_WORDS)))
        ptx.wgmma_commit()

    @ptx.device_function
    def next_stage(stage, phase):
        stage = i32(stage + 1)
        if stage == stages:
            stage, phase = i32(0), u32(phase ^ u32(1))
        return stage, phase

    @ptx.device_function
    def rescale(sums, factor_0, factor_1):
        for j in range(sums_count // 4):
            sums[4 * j] *= factor_0
            sums[4 * j + 1] *= factor_0
            sums[4 * j + 2] *= factor_1
            sums[4 * j + 3] *= factor_1

    @ptx.device_function
    def begin(sums):
        for i in range(sums_count):
            sums[i] = _ZERO
        if not scaled:
            fence_sums(sums)

    @ptx.device_function
    def multiply_unit(
        io,
        words,
        barriers,
        stages_start,
        full,
        empty,
        stage,
        phase,
        before,
        sums,
        a,
        b,
        codes,
        scales,
        scale_0,
        scale_1,
        ahead_start,
        ahead,
        lane,
    ):
        new_0, new_1 = scales[0], scales[1]
        live_0, live_1 = new_0 != _ZERO, new_1 != _ZERO
        if scale_0 == _ZERO:
            scale_0 = new_0 if live_0 else _ONE
        if scale_1 == _ZERO:
            scale_1 = new_1 if live_1 else _ONE
        new_0, new_1 = new_0 if live_0 else scale_0, new_1 if live_1 else scale_1
        convert(codes, 0, a, live_0, live_1)
        load(io.weights, ahead_start, ahead, 0, lane, codes)
        load_scales(io.weights, ahead_start, ahead, lane, scales)
        ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
        if scaled:
            wait_all(sums, codes)
            release(barriers, empty, before, lane)
            rescale(sums, ptx.divide(scale_0, new_0), ptx.divide(scale_1, new_1))
            fence_both(sums, a)
        else:
            fence_a(a)
        start_products(words, sums, a, stages_start, stage)
        if not scaled:
            wait_before_second(codes)
            release(barriers, empty, before, lane)
        before = stage
        stage, phase = next_stage(stage, phase)

        convert(codes, 1, b, live_0, live_1)
        load(io.weights, ahead_start, ahead, 1, lane, codes)
        ptx.barrier_wait(barriers, u32(full + u32(8) * u32(stage)), phase)
        fence_a(b)
        start_products(words, sums, b, stages_start, stage)
        wait_before_first(codes)
        release(barriers, empty, before, lane)
        before = stage
        stage, phase = next_stage(stage, phase)
        return stage, phase, before, new_0, new_1

    @ptx.device_function
    def finish(barriers, empty, before, sums, codes, scale_0, scale_1, lane):
        wait_all(sums, codes)
        release(barriers, empty, before, lane)
        if scaled:
            rescale(sums, scale_0, scale_1)
        return i32(-1)

    return begin, multiply_unit, finish
