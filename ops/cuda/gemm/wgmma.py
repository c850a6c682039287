"""The GEMM of sm_90: `wgmma` with FP8 weights that are converted in registers, warp-specialised and persistent.

A CTA's tile is 128 weight rows by `tile_tokens`. Two consumer warpgroups have 64 rows each, a warp one prepacked tile;
they load weights themselves, one unit ahead, and multiply them by X from shared memory. A producer warp copies X, whose
tiled order a plain bulk copy brings swizzled into a pipeline stage, and prefetches the weights of later units into L2.
It has a warpgroup of its own, because registers can only be given away by whole warpgroups.

Each stage has two mbarriers: `full` completes a phase when the bytes have arrived, `empty` when all consumer warps have
multiplied them. Stage n % stages waits for phase n // stages.

What a warpgroup does with the weights and X: `multiply.py`.
"""

from typing import Any

from numba import cuda, float32, int32, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import CONSUMER_WARPS, make_tile_writer, make_weights_start
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.fixup import STATE_WORDS
from numba_atomflow.ops.cuda.gemm.multiply import (
    BEFORE,
    PHASE,
    STAGE,
    Pipeline,
    Registers,
    Units,
    Weights,
    make_multiply,
    make_turns,
    register_sets,
)
from numba_atomflow.ops.cuda.gemm.plan import SHARED_SM_TOKENS, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import Schedule, make_schedule
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, WeightLoads, make_weight_loads
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import COPY_THREADS, make_copy_weights, make_fp8_consumer
from numba_atomflow.ops.cuda.scalars import i32, u32

THREADS = CONSUMERS + 128
ALIGNMENT = ptx.SWIZZLE_ATOM_BYTES
_REGISTERS = {1: (232, 40), 2: (96, 40)}  # of a consumer and a producer thread, by CTAs for which an SM has room
_SPANS_AHEAD = 2  # of weights that are prefetched into L2: from the one whose X is copied


class Shared:
    """Layout of shared memory, in words from the first multiple of `ALIGNMENT`: stages of X, their scales and weights
    (FP8), the epilogue's stage, `full` and `empty` barriers, the fix-up's state.
    """

    def __init__(self, plan: GemmPlan, epilogue_words: int) -> None:
        self.scales = plan.stages * plan.stage_words
        self.weights = self.scales + plan.stages * plan.stage_scales
        self.epilogue = self.weights + plan.stages * plan.stage_weights
        self.full = self.epilogue + epilogue_words
        self.empty = self.full + 2 * plan.stages
        self.state = self.empty + 2 * plan.stages
        self.bytes = 4 * (self.state + STATE_WORDS) + ALIGNMENT


def resident_ctas(plan: GemmPlan) -> int:
    """CTAs for which an SM has room. The grid has one per SM; room for two lets those of the next kernel start, and
    prefetch their weights, while those of this one still run (programmatic dependent launch).
    """
    return 2 if plan.tile_tokens <= SHARED_SM_TOKENS and plan.layout.format.bits == 8 else 1


def wgmma_shared_bytes(plan: GemmPlan, epilogue: GemmEpilogue) -> int:
    """Dynamic shared memory of a CTA."""
    return Shared(plan, epilogue.stage_words).bytes


def make_gemm_wgmma(plan: GemmPlan, epilogue: GemmEpilogue, *, dependent: bool = False) -> Any:
    """A projection's kernel of `THREADS` threads. Its parameter `io` has `weights`, `x`, `partials`, `counters`,
    `token_tiles` and what the epilogue reads and writes.
    """
    schedule, loads, shared = make_schedule(plan), make_weight_loads(plan.layout), Shared(plan, epilogue.stage_words)
    produce = _make_producer(plan, schedule, loads, epilogue, shared, dependent)
    fp8, arrivals = plan.x.bits == 8, 1
    if fp8:
        copy_weights, arrivals = make_copy_weights(plan, schedule, shared), 1 + COPY_THREADS
        consume = make_fp8_consumer(plan, schedule, epilogue, shared, dependent)
    else:
        consume = _make_consumer(plan, schedule, loads, epilogue, shared, dependent)
    stages, full_at, empty_at, unaligned = plan.stages, shared.full // 2, shared.empty // 2, ALIGNMENT - 1
    resident = resident_ctas(plan)
    consumer_registers, producer_registers = _REGISTERS[resident]
    fewer_registers = ptx.make_set_registers("dec", producer_registers)
    more_registers = ptx.make_set_registers("inc", consumer_registers)

    @ptx.kernel(THREADS, resident)
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
                ptx.barrier_init(barriers, u32(full + u32(8 * stage)), u32(arrivals))
                ptx.barrier_init(barriers, u32(empty + u32(8 * stage)), u32(CONSUMER_WARPS))
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread >= CONSUMERS:
            fewer_registers()
            if thread < CONSUMERS + 32:
                produce(io, words, barriers, u32(address + u32(skipped)), full, empty, i32(thread - CONSUMERS))
            elif fp8:
                at = u32(address + u32(skipped))
                copy_weights(io, words, barriers, at, full, empty, i32(thread - CONSUMERS - 32))
        else:
            more_registers()
            consume(io, words, barriers, i32(skipped >> 2), full, empty, thread)

    return gemm


def _make_producer(
    plan: GemmPlan, schedule: Schedule, loads: WeightLoads, epilogue: GemmEpilogue, shared: Shared, dependent: bool
) -> Any:
    """Device function (io, words, barriers, stages_start, full, empty, lane): what the producer warp does.

    `stages_start`, `full`, `empty`: addresses of shared memory.
    """
    work, prefetch_span, span_units = schedule.work, loads.prefetch, loads.span_units
    prefetch_for_epilogue = epilogue.prefetch
    tiles, tile_words, stages = plan.layout.tiles, plan.layout.tile_words, plan.stages
    stage_words, unit_blocks, block_words = plan.stage_words, plan.unit_blocks, plan.x.block_words
    stage_bytes, scale_bytes = 4 * stage_words, 4 * plan.stage_scales
    scales_at, scales_start, x_tokens, tile_tokens = (
        4 * shared.scales,
        plan.x.scales_start,
        plan.x.tokens,
        plan.tile_tokens,
    )

    @ptx.large_device_function
    def prefetch(io, lane, units, following, span):
        """Span number `span` of the prepacked tiles of the 8 consumer warps, by 8 lanes; counted on into `following`.

        `units`, `following`: (tile, first unit, last unit + 1).
        """
        tile, _, last = units
        beyond = span * span_units >= last
        if beyond:
            span = i32(span - i32(u32(last + span_units - 1) // u32(span_units)))
            tile, first, last = following
            span = i32(span + i32(u32(first) // u32(span_units)))
        if tile >= 0 and span * span_units < last and lane < CONSUMER_WARPS:
            prepacked = min(i32(u32(tile) // u32(io.token_tiles)) * CONSUMER_WARPS + lane, tiles - 1)
            prefetch_span(io.weights, prepacked * tile_words, span)

    @ptx.large_device_function
    def produce(io, words, barriers, stages_start, full, empty, lane):
        stage, phase = i32(0), u32(0)
        number = i32(1)
        tile, first, last = work(i32(0), io.token_tiles)
        next_tile, next_first, next_last = work(number, io.token_tiles)
        for ahead in range(_SPANS_AHEAD):
            span = i32(i32(u32(first) // u32(span_units)) + ahead)
            prefetch(io, lane, (tile, first, last), (next_tile, next_first, next_last), span)
        if dependent:
            ptx.let_next_kernel_start()
            ptx.wait_for_previous_kernel()
        while tile >= 0:
            row_tile, token_tile = i32(u32(tile) // u32(io.token_tiles)), i32(u32(tile) % u32(io.token_tiles))
            source = first * unit_blocks * block_words + token_tile * stage_words
            scales = scales_start + first * x_tokens + token_tile * tile_tokens  # a K block of FP8 is a unit
            for unit in range(first, last):
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
                prefetch_for_epilogue(io, row_tile, token_tile * tile_tokens, unit, lane)
                span = i32(u32(unit) // u32(span_units))
                if unit == first or span * span_units == unit:
                    span = i32(span + _SPANS_AHEAD)
                    prefetch(io, lane, (tile, first, last), (next_tile, next_first, next_last), span)
            number = i32(number + 1)
            tile, first, last = next_tile, next_first, next_last
            next_tile, next_first, next_last = work(number, io.token_tiles)

    return produce


def _make_consumer(
    plan: GemmPlan, schedule: Schedule, loads: WeightLoads, epilogue: GemmEpilogue, shared: Shared, dependent: bool
) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.
    """
    work, weights_start = schedule.work, make_weights_start(plan)
    write, finish_tiles = make_tile_writer(plan, schedule, epilogue, shared.epilogue, shared.state)
    sums_count, code_registers, sets = plan.tile_tokens // 2, loads.code_registers, register_sets(plan)
    load_unit = _make_load_unit(loads)
    begin, multiply_tile, finish = make_multiply(plan, loads)
    wait_for_turn, pass_turn = make_turns(plan)

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums = cuda.local.array(sums_count, float32)
        a, b = cuda.local.array(A_REGISTERS, uint32), cuda.local.array(A_REGISTERS, uint32)
        codes_0, codes_1 = cuda.local.array(code_registers, uint32), cuda.local.array(code_registers, uint32)
        scales_0, scales_1 = cuda.local.array(2, float32), cuda.local.array(2, float32)
        factors, state = cuda.local.array(2, float32), cuda.local.array(3, int32)
        lane, warp = i32(thread & 31), i32(thread >> 5)
        warpgroup = i32(thread >> 7)
        pipeline = Pipeline(words, barriers, u32(ptx.shared_address(words, skipped)), full, empty, warpgroup)
        registers = Registers(sums, a, b, factors, state)
        held = Weights(codes_0, scales_0, codes_1, scales_1)
        state[STAGE], state[PHASE], state[BEFORE] = i32(0), i32(0), i32(-1)
        number, shared_from = i32(0), i32(-1)
        tile, first, last = work(number, io.token_tiles)
        start = weights_start(tile if tile > 0 else i32(0), warp, io.token_tiles)
        loaded = i32(0)  # whether the first units of the tile are loaded, or on their way
        if dependent:
            ptx.let_next_kernel_start()
        waited = False
        if warpgroup == 1:
            pass_turn(warpgroup)
        while tile >= 0:
            number = i32(number + 1)
            next_tile, next_first, next_last = work(number, io.token_tiles)
            next_start = weights_start(next_tile if next_tile > 0 else i32(0), warp, io.token_tiles)
            if loaded == 0:
                load_unit(io.weights, start, first, lane, codes_0, scales_0)
                if sets == 2:
                    load_unit(io.weights, start, first + 1 if first + 1 < last else first, lane, codes_1, scales_1)
            if dependent and not waited:
                ptx.wait_for_previous_kernel()
                waited = True
            begin(registers)
            multiply_tile(
                io, pipeline, registers, held, Units(start, first, last), Units(next_start, next_first, next_last), lane
            )
            finish(pipeline, registers, held, lane)
            shared_from = write(io, words, skipped, i32(number - 1), shared_from, tile, first, last, sums, thread)
            loaded = i32(last - first >= sets)
            tile, first, last, start = next_tile, next_first, next_last, next_start
        if warpgroup == 0:
            wait_for_turn(warpgroup)  # the other's last pass
        finish_tiles(io, words, skipped, shared_from, thread)

    return consume


def _make_load_unit(loads: WeightLoads) -> Any:
    """Device function (weights, start, unit, lane, codes, scales): load a whole unit."""
    load, load_scales = loads.load, loads.load_scales

    @ptx.large_device_function
    def load_unit(weights, start, unit, lane, codes, scales):
        load_scales(weights, start, unit, lane, scales)
        load(weights, start, unit, 0, lane, codes)
        load(weights, start, unit, 1, lane, codes)

    return load_unit
