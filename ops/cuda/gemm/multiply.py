"""What a consumer warpgroup does for a tile: `wgmma` of weights in registers with X in pipeline stages; scales.

Scales. A is the bare codes. Between units (of one scale each) the accumulators are multiplied by s[u - 1] / s[u], after
the last one by its s: the sum over units of s times the unit's products, without a second set of accumulators. A unit
whose scale is 0 has no codes but 0, and takes the scale of the one before; the first one's is 1.

Order of a unit, per warpgroup. Its codes are in registers. Wait for X and for the products of the last unit; rescale;
convert the codes to A, whose registers that wait freed; start the products of both K blocks. While they are under way,
read the codes of the next unit from shared memory (`WeightSource.read_next`). What a warpgroup does between its
products the other one's products run beside, if it takes no longer than they do: hence as little as possible comes
there. The order of additions of an element does not depend on `tile_tokens`.
"""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, WeightLoads
from numba_atomflow.ops.cuda.scalars import f32, i32, u32, u64

STAGE, PHASE, BEFORE, STATE_REGISTERS = range(4)  # of `Registers.state`
_ZERO, _ONE = f32(0.0), f32(1.0)
_TURNS_FROM = 64  # tokens of a tile, from which warpgroups take turns
_TURN_BARRIERS = 2  # the first of the named barriers at which warpgroups wait for their turn


class Pipeline(NamedTuple):
    """Shared memory: `words` and `barriers`, views of all of it; addresses of the stages of X and of their barriers;
    word at which the warp's part of the slots of weights begins. Numbers of the lane, of the warp, and of the
    warpgroup: 0 or 1.
    """

    words: Any
    barriers: Any
    stages: Any
    full: Any
    empty: Any
    slots: Any
    lane: Any
    warp: Any
    warpgroup: Any


class Registers(NamedTuple):
    """Local arrays of a thread.

    Attributes:
        sums: float32 [tile_tokens / 2], the accumulators.
        a, b: uint32 [A_REGISTERS], A of the first and of the second K block of a unit.
        codes, scales: of the next unit, as `WeightSource.read_next` has them.
        factors: float32 [2], what the sums of rows g and g + 8 are yet to be multiplied by.
        state: int32 [STATE_REGISTERS]: the stage that is read next and its phase's parity; the stage that a batch of
            products which may be under way reads, or -1.
        cursor: int32 [WeightSource.cursor_words], where in the weights the thread is.
    """

    sums: Any
    a: Any
    b: Any
    codes: Any
    scales: Any
    factors: Any
    state: Any
    cursor: Any


def make_turns(plan: GemmPlan) -> tuple[Any, Any]:
    """Device functions (warpgroup): wait for the turn of this warpgroup; pass it to the other one.

    A warpgroup starts the products of a whole unit, then the other one does: each scales and converts while the tensor
    cores work for the other. Left to themselves both would wait for products at the same time.
    """
    takes_turns = plan.tile_tokens >= _TURNS_FROM

    @ptx.device_function
    def wait_for_turn(warpgroup):
        if takes_turns:
            ptx.named_barrier_sync(u32(_TURN_BARRIERS + warpgroup), u32(CONSUMERS))

    @ptx.device_function
    def pass_turn(warpgroup):
        if takes_turns:
            ptx.named_barrier_arrive(u32(_TURN_BARRIERS + 1 - warpgroup), u32(CONSUMERS))

    return wait_for_turn, pass_turn


def make_multiply(plan: GemmPlan, loads: WeightLoads, read_next: Any) -> tuple[Any, Any, Any]:
    """Device functions of a warpgroup. `read_next`: `WeightSource`'s, to be called once before the first unit.

    begin: (registers): a tile's sums are 0.
    multiply_unit: (io, pipeline, registers): start the products of the unit whose codes are read and whose X is in the
    next two stages; then `read_next`.
    finish: (pipeline, registers): wait for all products, and scale them.
    """
    sums_count, scaled = plan.tile_tokens // 2, plan.layout.format.scaled
    wait_all = ptx.make_wgmma_wait(0, ptx.Registers(sums_count))
    release, rescale, multiply_unit = _make_multiply_unit(plan, loads, read_next)

    @ptx.device_function
    def begin(registers):
        for i in range(sums_count):
            registers.sums[i] = _ZERO
        registers.factors[0], registers.factors[1] = _ONE, _ONE

    @ptx.device_function
    def finish(pipeline, registers):
        wait_all(registers.sums)
        release(pipeline, registers.state[BEFORE])
        registers.state[BEFORE] = i32(-1)
        if scaled:
            rescale(registers.sums, registers.factors[0], registers.factors[1])

    return begin, multiply_unit, finish


def _make_multiply_unit(plan: GemmPlan, loads: WeightLoads, read_next: Any) -> tuple[Any, Any, Any]:
    """Device functions.

    release: (pipeline, stage): this warp has multiplied the stage (none if it is -1).
    rescale: (sums, factor_0, factor_1): of rows g and g + 8.
    multiply_unit: as `make_multiply` has it.
    """
    sums_count, stages, stage_bytes = plan.tile_tokens // 2, plan.stages, 4 * plan.stage_words
    convert, scaled = loads.convert, plan.layout.format.scaled
    step_0, step_1, step_2, step_3 = (ptx.make_wgmma(plan.tile_tokens, a_first=4 * step) for step in range(4))
    all_sums, all_a = ptx.Registers(sums_count), ptx.Registers(A_REGISTERS)
    fence_sums, fence_a = ptx.make_wgmma_fence(all_sums, all_a), ptx.make_wgmma_fence(all_a)
    # Codes are named because they are converted into registers that the products before were reading.
    wait_all = ptx.make_wgmma_wait(0, all_sums, ptx.Registers(loads.code_registers))
    wait_for_first_block = ptx.make_wgmma_wait(1)
    wait_for_turn, pass_turn = make_turns(plan)

    @ptx.device_function
    def release(pipeline, stage):
        if stage >= 0 and pipeline.lane == 0:
            ptx.barrier_arrive(pipeline.barriers, u32(pipeline.empty + u32(8) * u32(stage)))

    @ptx.device_function
    def rescale(sums, factor_0, factor_1):
        for j in range(sums_count // 4):
            sums[4 * j] *= factor_0
            sums[4 * j + 1] *= factor_0
            sums[4 * j + 2] *= factor_1
            sums[4 * j + 3] *= factor_1

    @ptx.device_function
    def await_stage(pipeline, state):
        barrier = u32(pipeline.full + u32(8) * u32(state[STAGE]))
        ptx.barrier_wait(pipeline.barriers, barrier, u32(state[PHASE]))

    @ptx.device_function
    def start_products(pipeline, sums, a, state):
        """A K block: a batch of four k-steps."""
        address = u32(pipeline.stages + u32(state[STAGE]) * u32(stage_bytes))
        x = ptx.wgmma_descriptor(address, 16, ptx.SWIZZLE_ATOM_BYTES)
        step_0(sums, a, pipeline.words, x)
        step_1(sums, a, pipeline.words, u64(x + u64(ptx.K_STEP_WORDS)))
        step_2(sums, a, pipeline.words, u64(x + u64(2 * ptx.K_STEP_WORDS)))
        step_3(sums, a, pipeline.words, u64(x + u64(3 * ptx.K_STEP_WORDS)))
        ptx.wgmma_commit()

    @ptx.device_function
    def next_stage(state):
        state[BEFORE] = state[STAGE]
        state[STAGE] = i32(state[STAGE] + 1)
        if state[STAGE] == stages:
            state[STAGE], state[PHASE] = i32(0), i32(state[PHASE] ^ 1)

    @ptx.large_device_function
    def multiply_unit(io, pipeline, registers):
        sums, a, b, codes, scales, factors, state, _ = registers
        live_0, live_1 = scales[0] != _ZERO, scales[1] != _ZERO
        ratio_0, ratio_1 = factors[0], factors[1]
        factors[0], factors[1] = scales[0] if live_0 else factors[0], scales[1] if live_1 else factors[1]
        ratio_0, ratio_1 = ratio_0 * ptx.reciprocal(factors[0]), ratio_1 * ptx.reciprocal(factors[1])
        await_stage(pipeline, state)
        wait_all(sums, codes)
        release(pipeline, state[BEFORE])
        if scaled:
            rescale(sums, ratio_0, ratio_1)
        convert(codes, 0, a, live_0, live_1)
        convert(codes, 1, b, live_0, live_1)
        wait_for_turn(pipeline.warpgroup)
        fence_sums(sums, a)
        start_products(pipeline, sums, a, state)
        next_stage(state)
        await_stage(pipeline, state)
        fence_a(b)
        start_products(pipeline, sums, b, state)
        pass_turn(pipeline.warpgroup)
        read_next(io, pipeline, registers)
        wait_for_first_block()
        release(pipeline, state[BEFORE])
        next_stage(state)

    return release, rescale, multiply_unit
