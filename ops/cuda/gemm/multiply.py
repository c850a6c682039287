"""What a consumer warpgroup does for a tile: `wgmma` of weights in registers with X in pipeline stages; scales.

Scales. A is the bare codes. Between units (of one scale each) the accumulators are multiplied by s[u - 1] / s[u], after
the last one by its s: the sum over units of s times the unit's products, without a second set of accumulators. A unit
whose scale is 0 has no codes but 0, and takes the scale of the one before.

Order of a unit, per warpgroup, as it is written: while the second block of the last unit is multiplied, convert the
first block (its registers of A are free) and wait for X; wait for the products; rescale; start the first block; convert
the second, whose registers of A that wait freed; start it; wait until only it is under way. ptxas moves the wait for
the products up to the one for X, and the first block's conversion behind it: only the other warpgroup's products run
beside that conversion. Loads of a later unit are issued as soon as the codes are converted: the next unit's, or with
two sets of registers (small tiles, whose units take less time than a load) those of the one after. The order of
additions of an element does not depend on `tile_tokens`.
"""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.weights import A_REGISTERS, WeightLoads
from numba_atomflow.ops.cuda.scalars import f32, i32, u32, u64

STAGE, PHASE, BEFORE = range(3)  # of `Registers.state`
_ZERO, _ONE = f32(0.0), f32(1.0)
_TWO_SETS = 128  # tokens of a tile, up to which there are registers for two units of weights
_TURNS_FROM = 64  # tokens of a tile, from which warpgroups take turns
_TURN_BARRIERS = 2  # the first of the named barriers at which warpgroups wait for their turn


class Pipeline(NamedTuple):
    """Shared memory: `words` and `barriers`, views of all of it; addresses of the stages of X and of their barriers.
    Number of the warpgroup: 0 or 1.
    """

    words: Any
    barriers: Any
    stages: Any
    full: Any
    empty: Any
    warpgroup: Any


class Registers(NamedTuple):
    """Local arrays of a thread.

    Attributes:
        sums: float32 [tile_tokens / 2], the accumulators.
        a, b: uint32 [A_REGISTERS], A of the first and of the second K block of a unit.
        factors: float32 [2], what the sums of rows g and g + 8 are yet to be multiplied by; 0: nothing was summed.
        state: int32 [3]: the stage that is read next and its phase's parity, and the stage that a batch of products
            which may be under way reads, or -1.
    """

    sums: Any
    a: Any
    b: Any
    factors: Any
    state: Any


class Weights(NamedTuple):
    """Local arrays of a thread: codes and scales of the next unit, and of the one after if there are two sets."""

    codes_0: Any
    scales_0: Any
    codes_1: Any
    scales_1: Any


class Units(NamedTuple):
    """Units `first` to `last` - 1 of the prepacked tile that begins at word `start`."""

    start: Any
    first: Any
    last: Any


def register_sets(plan: GemmPlan) -> int:
    """How many units of weights a thread holds."""
    return 2 if plan.tile_tokens <= _TWO_SETS else 1


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


def make_multiply(plan: GemmPlan, loads: WeightLoads) -> tuple[Any, Any, Any]:
    """Device functions of a warpgroup.

    begin: (registers): a tile's sums are 0.
    multiply_tile: (io, pipeline, registers, weights, units, following, lane): add the products of `units`, whose first
    are loaded; afterwards the first of `following` are.
    finish: (pipeline, registers, weights, lane): wait for all products, and scale them.
    """
    sums_count, sets, code_registers = plan.tile_tokens // 2, register_sets(plan), loads.code_registers
    scaled, wait_all = plan.layout.format.scaled, ptx.make_wgmma_wait(0, ptx.Registers(sums_count))
    release, rescale, multiply_unit = _make_multiply_unit(plan, loads)

    @ptx.device_function
    def begin(registers):
        for i in range(sums_count):
            registers.sums[i] = _ZERO
        registers.factors[0], registers.factors[1] = _ZERO, _ZERO

    @ptx.device_function
    def finish(pipeline, registers, weights, lane):
        wait_all(registers.sums)
        release(pipeline, registers.state[BEFORE], lane)
        registers.state[BEFORE] = i32(-1)
        if scaled:
            rescale(registers.sums, registers.factors[0], registers.factors[1])

    @ptx.device_function
    def after(unit, units, following):
        """Where unit number `unit` is, counted on from `units` into `following`; within the latter."""
        beyond = i32(following.first + unit - units.last)
        beyond = beyond if beyond < following.last else i32(following.last - 1)
        return (units.start, unit) if unit < units.last else (following.start, beyond if beyond > 0 else i32(0))

    @ptx.device_function
    def multiply_with_one_set(io, pipeline, registers, weights, units, following, lane):
        unit = units.first
        while unit < units.last:
            unit = i32(unit + 1)
            start, ahead = after(unit, units, following)
            multiply_unit(
                io, pipeline, registers, weights.codes_0, weights.scales_0, weights.codes_0, start, ahead, lane
            )

    @ptx.device_function
    def multiply_with_two_sets(io, pipeline, registers, weights, units, following, lane):
        unit = units.first
        while unit < units.last:
            unit = i32(unit + 1)
            start, ahead = after(i32(unit + 1), units, following)
            multiply_unit(
                io, pipeline, registers, weights.codes_0, weights.scales_0, weights.codes_1, start, ahead, lane
            )
            if unit < units.last:
                unit = i32(unit + 1)
                start, ahead = after(i32(unit + 1), units, following)
                multiply_unit(
                    io, pipeline, registers, weights.codes_1, weights.scales_1, weights.codes_0, start, ahead, lane
                )
        if units.last - units.first & 1:  # the next unit is in the second set
            for i in range(code_registers):
                weights.codes_0[i], weights.codes_1[i] = weights.codes_1[i], weights.codes_0[i]
            for i in range(2):
                weights.scales_0[i], weights.scales_1[i] = weights.scales_1[i], weights.scales_0[i]

    return begin, multiply_with_two_sets if sets == 2 else multiply_with_one_set, finish


def _make_multiply_unit(plan: GemmPlan, loads: WeightLoads) -> tuple[Any, Any, Any]:
    """Device functions.

    release: (pipeline, stage, lane): this warp has multiplied the stage (none if it is -1).
    rescale: (sums, factor_0, factor_1): of rows g and g + 8.
    multiply_unit: (io, pipeline, registers, codes, scales, next_codes, start, ahead, lane): start the products of the
    unit whose weights are given and of X in the next two stages; load unit `ahead` of the tile at `start` in their
    place. `next_codes`: of the unit after.
    """
    sums_count, stages, stage_bytes = plan.tile_tokens // 2, plan.stages, 4 * plan.stage_words
    load, load_scales, convert, half = loads.load, loads.load_scales, loads.convert, loads.code_registers // 2
    scaled = plan.layout.format.scaled
    step_0, step_1, step_2, step_3 = (ptx.make_wgmma(plan.tile_tokens, a_first=4 * step) for step in range(4))
    all_sums, all_a = ptx.Registers(sums_count), ptx.Registers(A_REGISTERS)
    first_codes, second_codes = ptx.Registers(half), ptx.Registers(half, half)
    fence_a, fence_both = ptx.make_wgmma_fence(all_a), ptx.make_wgmma_fence(all_sums, all_a)
    # A is named so that it is converted before the wait, in PTX at least; codes, because what is converted next goes
    # into registers that the batch was reading.
    wait_all = ptx.make_wgmma_wait(0, all_sums, all_a, second_codes)
    wait_before_next = ptx.make_wgmma_wait(1, first_codes)
    wait_for_turn, pass_turn = make_turns(plan)

    @ptx.device_function
    def release(pipeline, stage, lane):
        if stage >= 0 and lane == 0:
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
    def multiply_unit(io, pipeline, registers, codes, scales, next_codes, start, ahead, lane):
        sums, a, b, factors, state = registers
        live_0, live_1 = scales[0] != _ZERO, scales[1] != _ZERO
        old_0 = factors[0] if factors[0] != _ZERO else scales[0] if live_0 else _ONE
        old_1 = factors[1] if factors[1] != _ZERO else scales[1] if live_1 else _ONE
        factors[0], factors[1] = scales[0] if live_0 else old_0, scales[1] if live_1 else old_1
        ratio_0, ratio_1 = ptx.divide(old_0, factors[0]), ptx.divide(old_1, factors[1])
        convert(codes, 0, a, live_0, live_1)
        load(io.weights, start, ahead, 0, lane, codes)
        load_scales(io.weights, start, ahead, lane, scales)
        await_stage(pipeline, state)
        wait_all(sums, a, codes)
        release(pipeline, state[BEFORE], lane)
        if scaled:
            rescale(sums, ratio_0, ratio_1)
        wait_for_turn(pipeline.warpgroup)
        fence_both(sums, a)
        start_products(pipeline, sums, a, state)
        next_stage(state)

        convert(codes, 1, b, live_0, live_1)
        load(io.weights, start, ahead, 1, lane, codes)
        await_stage(pipeline, state)
        fence_a(b)
        start_products(pipeline, sums, b, state)
        pass_turn(pipeline.warpgroup)
        wait_before_next(next_codes)
        release(pipeline, state[BEFORE], lane)
        next_stage(state)

    return release, rescale, multiply_unit
