"""The GEMM of sm_90: `wgmma` with FP8 weights that are converted in registers, warp-specialised and persistent.

A CTA's tile is 128 weight rows by `tile_tokens`. Two consumer warpgroups have 64 rows each, a warp one prepacked tile;
they read weights from shared memory, one unit ahead, and multiply them by X there. A producer warp copies X, whose
tiled order a plain bulk copy brings swizzled into a pipeline stage. It has a warpgroup of its own, because registers
can only be given away by whole warpgroups; its three other warps copy FP8 weights (`weight_copies.py`), if the tile has
`plan.COPIED_FROM` tokens or more. With fewer, and of float16 weights, a consumer lane copies its own part (`ring.py`).

Each stage has two mbarriers: `full` completes a phase when the bytes have arrived, `empty` when all consumer warps have
multiplied them. Stage n % stages waits for phase n // stages. Slots of copied weights have two likewise.

What a warpgroup does with the weights and X: `multiply.py`. FP8 activations have another consumer (`wgmma_fp8.py`), and
weights in the stages of X; only with them the producer also prefetches the weights of later units into L2.
"""

from typing import Any

from numba import cuda, float32, int32, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.consumer import CONSUMER_WARPS, make_tile_writer
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, GemmEpilogue
from numba_atomflow.ops.cuda.gemm.multiply import (
    BEFORE,
    PHASE,
    STAGE,
    STATE_REGISTERS,
    Pipeline,
    Registers,
    make_multiply,
    make_turns,
)
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.ring import make_weight_ring
from numba_atomflow.ops.cuda.gemm.schedule import Schedule, make_schedule
from numba_atomflow.ops.cuda.gemm.weight_copies import COPY_THREADS, make_copied_weights, make_copy_weights
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, WeightLoads, make_weight_loads
from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import make_fp8_consumer
from numba_atomflow.ops.cuda.scalars import i32, u32

THREADS = CONSUMERS + 128
ALIGNMENT = ptx.SWIZZLE_ATOM_BYTES
# Of a consumer and a producer thread, by bits of activations and CTAs for which an SM has room:
_REGISTERS = {(16, 1): (232, 40), (16, 2): (104, 32), (8, 1): (232, 40), (8, 2): (96, 40)}
_SPANS_AHEAD = 2  # of weights that are prefetched into L2: from the one whose X is copied


class Shared:
    """Layout of shared memory, in words from the first multiple of `ALIGNMENT`: stages of X, their scales (of FP8), the
    weights of stages (with FP8 activations) or of the ring (with float16), the epilogue's stage, and the barriers of
    stages. If other warps fill the ring, its slots have barriers of their own; else weights have those of stages.
    """

    def __init__(self, plan: GemmPlan, epilogue_words: int) -> None:
        self.scales = plan.stages * plan.stage_words
        self.weights = self.scales + plan.stages * plan.stage_scales
        self.epilogue = self.weights + plan.stages * plan.stage_weights + plan.ring_words
        self.full = self.epilogue + epilogue_words
        self.empty = self.full + 2 * plan.stages
        self.weights_full, self.weights_empty, end = self.full, self.empty, self.empty + 2 * plan.stages
        if plan.copies_weights:
            self.weights_full, self.weights_empty, end = end, end + 2 * plan.ring, end + 4 * plan.ring
        self.bytes = 4 * end + ALIGNMENT


def wgmma_shared_bytes(plan: GemmPlan, epilogue: GemmEpilogue) -> int:
    """Dynamic shared memory of a CTA."""
    return Shared(plan, epilogue.stage_words).bytes


def make_gemm_wgmma(plan: GemmPlan, epilogue: GemmEpilogue, *, dependent: bool = False) -> Any:
    """A projection's kernel of `THREADS` threads. Its parameter `io` has `weights`, `x`, `partials`,
    `token_tiles` and what the epilogue reads and writes.
    """
    schedule, loads, shared = make_schedule(plan), make_weight_loads(plan.layout), Shared(plan, epilogue.stage_words)
    produce = _make_producer(plan, schedule, loads, epilogue, shared, dependent)
    fp8, own_slots = plan.x.bits == 8, plan.ring if plan.copies_weights else 0
    copies, arrivals = fp8 or own_slots > 0, 1 + COPY_THREADS if fp8 else 1
    copy_weights = make_copy_weights(plan, schedule, shared)
    make_consumer = make_fp8_consumer if fp8 else _make_consumer
    consume = make_consumer(plan, schedule, epilogue, shared, dependent)
    stages, full_at, empty_at, unaligned = plan.stages, shared.full // 2, shared.empty // 2, ALIGNMENT - 1
    weights_full_at, weights_empty_at = shared.weights_full // 2, shared.weights_empty // 2
    consumer_registers, producer_registers = _REGISTERS[plan.x.bits, plan.resident]
    fewer_registers = ptx.make_set_registers("dec", producer_registers)
    more_registers = ptx.make_set_registers("inc", consumer_registers)

    @ptx.kernel(THREADS, plan.resident)
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
            for slot in range(own_slots):
                at = u32(address + u32(skipped) + u32(8 * slot))
                ptx.barrier_init(barriers, u32(at + u32(8 * weights_full_at)), u32(COPY_THREADS))
                ptx.barrier_init(barriers, u32(at + u32(8 * weights_empty_at)), u32(CONSUMER_WARPS))
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread >= CONSUMERS:
            fewer_registers()
            if thread < CONSUMERS + 32:
                produce(io, words, barriers, u32(address + u32(skipped)), full, empty, i32(thread - CONSUMERS))
            elif copies:
                at = u32(address + u32(skipped))
                weights_full, weights_empty = u32(at + u32(8 * weights_full_at)), u32(at + u32(8 * weights_empty_at))
                copy_weights(io, words, barriers, at, weights_full, weights_empty, i32(thread - CONSUMERS - 32))
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
    prefetches = plan.x.bits == 8  # with float16 activations, weights are copied far ahead
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
        if prefetches:
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
                if prefetches and (unit == first or span * span_units == unit):
                    span = i32(span + _SPANS_AHEAD)
                    prefetch(io, lane, (tile, first, last), (next_tile, next_first, next_last), span)
            number = i32(number + 1)
            tile, first, last = next_tile, next_first, next_last
            next_tile, next_first, next_last = work(number, io.token_tiles)

    return produce


def _make_consumer(plan: GemmPlan, schedule: Schedule, epilogue: GemmEpilogue, shared: Shared, dependent: bool) -> Any:
    """Device function (io, words, barriers, skipped, full, empty, thread): what a consumer thread does.

    `skipped`: words of shared memory before the first stage; `full`, `empty`: addresses of shared memory.
    """
    work, loads, weights_at = schedule.work, make_weight_loads(plan.layout), shared.weights
    source = make_copied_weights(plan, shared) if plan.copies_weights else make_weight_ring(plan, schedule)
    begin_weights, read_next, cursor_words, warp_words = source
    write, finish_tiles = make_tile_writer(plan, schedule, epilogue, shared.epilogue)
    sums_count, code_registers = plan.tile_tokens // 2, loads.code_registers
    begin, multiply_unit, finish = make_multiply(plan, loads, read_next)
    wait_for_turn, pass_turn = make_turns(plan)
    prepare = epilogue.prepare

    @ptx.device_function
    def consume(io, words, barriers, skipped, full, empty, thread):
        sums = cuda.local.array(sums_count, float32)
        a, b = cuda.local.array(A_REGISTERS, uint32), cuda.local.array(A_REGISTERS, uint32)
        codes, scales = cuda.local.array(code_registers, uint32), cuda.local.array(2, float32)
        factors, state = cuda.local.array(2, float32), cuda.local.array(STATE_REGISTERS, int32)
        cursor = cuda.local.array(cursor_words, int32)
        lane, warp, warpgroup = i32(thread & 31), i32(thread >> 5), i32(thread >> 7)
        slots = i32(skipped + weights_at + warp * warp_words)
        stages = u32(ptx.shared_address(words, skipped))
        pipeline = Pipeline(words, barriers, stages, full, empty, slots, lane, warp, warpgroup)
        registers = Registers(sums, a, b, codes, scales, factors, state, cursor)
        state[STAGE], state[PHASE], state[BEFORE] = i32(0), i32(0), i32(-1)
        number, shared_from = i32(0), i32(-1)
        begin_weights(io, pipeline, registers)
        if dependent:
            ptx.let_next_kernel_start()
        prepare(io, thread)
        if dependent:
            ptx.wait_for_previous_kernel()
        read_next(io, pipeline, registers)
        if warpgroup == 1:
            pass_turn(warpgroup)
        tile, first, last = work(number, io.token_tiles)
        while tile >= 0:
            begin(registers)
            for _ in range(first, last):
                multiply_unit(io, pipeline, registers)
            finish(pipeline, registers)
            shared_from = write(io, words, skipped, number, shared_from, tile, first, last, sums, thread)
            number = i32(number + 1)
            tile, first, last = work(number, io.token_tiles)
        if warpgroup == 0:
            wait_for_turn(warpgroup)  # the other's last pass
        finish_tiles(io, words, skipped, shared_from, thread)

    return consume
