"""A projection of the persistent kernel: the consumer warps' main loop over the stages of the pipeline.

Work tiles are processed in rounds. Stage q of a round, of any work tile, goes to warp q % `CONSUMER_WARPS`
(intra-CTA split-K); its 16 partial sums go to shared memory, and when the stages of the round are done a few threads
per work tile reduce them in order of K, so that every run gives the same bits. Rounds alternate between two buffers of
partial sums, so that one barrier per round is enough.

All projections of a step run through this one main loop, with their sizes as variables: a copy for each made the kernel
half as long again, took three times as long to compile, and was no faster.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, HALF_GROUP_WORDS
from numba_atomflow.ops.cuda.persistent.pipeline import await_barrier
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    K_TILE_GROUPS,
    LM_HEAD,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import swizzled, sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, WAITED
from numba_atomflow.ops.cuda.scalars import u32

_ZERO = np.float32(0.0)
_X_WORDS = u32(K_TILE_GROUPS * 64)  # of x, for a k-tile
BUFFER, CONSUMED = 0, 1  # of a warp's progress: the next buffer of partial sums; stages that the CTA has consumed


class OpState(NamedTuple):
    """What the epilogue of a projection reads and writes beside its sums.

    Attributes:
        mailbox, q, cache16, residual, intermediate, logits, seen, timestamps: as in `PersistentArguments`.
        op: its number. kind: of projection.
        input_flag, flag: of the residual stream at the layer's start, and of the layer's results.
        position: of the token. penalty: repetition penalty.
        keys_start, values_start: elements of `cache16` at which the layer's keys and values begin.
        best: the thread's own int64 [1], the largest sort key of its logits.
        watchdog: `Watchdog`.
    """

    mailbox: Any
    q: Any
    cache16: Any
    residual: Any
    intermediate: Any
    logits: Any
    seen: Any
    timestamps: Any
    op: Any
    kind: Any
    input_flag: Any
    flag: Any
    position: Any
    penalty: Any
    keys_start: Any
    values_start: Any
    best: Any
    watchdog: Any


class StageSizes(NamedTuple):
    """Sizes of a projection's pipeline stages.

    Attributes:
        k_tiles: stages that a work tile passes through. last_groups: groups of 128 weights in the last of them.
        half_tiles: 1 if work tiles have 8 rows, else 0. high_rows_offset: as in `make_multiply`.
    """

    k_tiles: Any
    last_groups: Any
    half_tiles: Any
    high_rows_offset: Any


def make_multiply(shape: PersistentShape, *, fp16: bool) -> Any:
    """Device function (words, floats, stage, x, high_rows_offset, groups, lane) -> the partial sums of a stage: lane
    4 g has that of row g, lane 4 g + 2 that of row g + 8.

    Arguments: x, the word of shared memory at which the stage's elements of the vector begin; high_rows_offset, words
    from there to the elements for rows 8-15: 0, or those of a k-tile, where rows 8-15 are rows 0-7 of the next k-tile;
    groups, groups of 128 weights in the k-tile.

    Shared memory delivers 128 bytes per cycle and SM. Were the vector all 8 columns of the mma's B operand, it would
    take as many as the weights. So each group of 128 weights along K has a column of its own, 0-3 for rows 0-7 and 4-7
    for rows 8-15: one fragment of the vector serves four groups, all of which are multiplied by all columns, and each
    result is taken from its own column.
    """
    load_codes, accumulate = make_load_codes(shape, fp16=fp16), _make_accumulate(shape, fp16=fp16)
    even, stage_words = is_even(shape, fp16=fp16), shape.stage_words
    x_step = 32 if fp16 else 64  # words of x per group
    code_registers, sum_registers = 16 * K_TILE_GROUPS, 4 * K_TILE_GROUPS

    @ptx.large_device_function
    def multiply(words, floats, stage, x, high_rows_offset, groups, lane):
        codes = cuda.local.array(code_registers, uint32)
        sums = cuda.local.array(sum_registers, float32)
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        odd, high_rows = t & u32(1) == u32(1), t >= u32(2)
        start = u32(stage * u32(stage_words))
        count = u32(K_TILE_GROUPS if even else groups)
        second = u32(start + count * u32(HALF_GROUP_WORDS))  # of rows 8-15: codes, then scales
        load_codes(words, start, second, groups, lane, codes)
        for i in range(sum_registers):
            sums[i] = _ZERO
        column = u32((g >> u32(2)) * high_rows_offset + (g & u32(3)) * u32(x_step))
        accumulate(words, x, column, t, groups, codes, sums)
        # A lane has columns 2 t and 2 t + 1 of the result: two of the groups, for row g (t < 2) or row g + 8.
        low, high = (sums[8], sums[10]) if odd else (sums[0], sums[2])
        first = high if high_rows else low
        low, high = (sums[13], sums[15]) if odd else (sums[5], sums[7])
        other = high if high_rows else low
        if not fp16:
            group = u32((t & u32(1)) * u32(2))
            scale = u32((second if high_rows else start) + count * u32(256) + group * u32(8) + g)
            if even or group < count:
                first *= floats[scale]
            if even or u32(group + u32(1)) < count:
                other *= floats[u32(scale + u32(8))]
        total = first + other
        return total + ptx.shuffle_xor_f32(total, 1)

    return multiply


def is_even(shape: PersistentShape, *, fp16: bool) -> bool:
    """Whether every k-tile of the projections of this format has all groups."""
    layouts = [layout for layout in shape.layouts if (layout.format.bits == 16) == fp16]
    return all(layout.last_k_tile_groups == K_TILE_GROUPS for layout in layouts)


def make_load_codes(shape: PersistentShape, *, fp16: bool) -> Any:
    """Device function (words, start, second, groups, lane, codes): the lane's weights of a k-tile into registers."""
    even = is_even(shape, fp16=fp16)

    @ptx.device_function
    def load_codes(words, start, second, groups, lane, codes):
        for u in range(K_TILE_GROUPS):
            if even or u < groups:
                for i in range(4):
                    if fp16:
                        offset = start + u * GROUP_WORDS + i * 128
                    else:
                        offset = (second if i % 2 else start) + u * 256 + i // 2 * 128
                    w0, w1, w2, w3 = ptx.load_shared_16(words, offset + lane * 4)
                    base = 16 * u + 4 * i
                    codes[base], codes[base + 1], codes[base + 2], codes[base + 3] = w0, w1, w2, w3

    return load_codes


def _make_accumulate(shape: PersistentShape, *, fp16: bool) -> Any:
    """Device function (words, x, column, t, groups, codes, sums): multiply the groups of a k-tile by the vector's
    fragments, of which this lane loads the elements from word x + column on.
    """
    even, fragments = is_even(shape, fp16=fp16), 2 if fp16 else 4  # of 16 bytes, of x

    @ptx.device_function
    def accumulate(words, x, column, t, groups, codes, sums):
        for i in range(fragments):
            unit = u32(4 * i + t) if fp16 else u32(i // 2 * 8 + i % 2 + 2 * t)
            b0, b1, b2, b3 = ptx.load_shared_16(words, u32(x + swizzled(u32(column + unit * u32(4)))))
            for k in range(2):
                for u in range(K_TILE_GROUPS):
                    if even or u < groups:
                        if fp16:
                            base = 16 * u + 8 * i + 2 * k
                            a0, a1, a2, a3 = codes[base], codes[base + 4], codes[base + 1], codes[base + 5]
                        else:
                            base = 16 * u + i // 2 * 8 + i % 2 * 2 + k
                            a0, a2 = ptx.convert_fp8_cvt(codes[base])
                            a1, a3 = ptx.convert_fp8_cvt(codes[base + 4])
                        c0, c1, c2, c3 = sums[4 * u], sums[4 * u + 1], sums[4 * u + 2], sums[4 * u + 3]
                        if k == 0:
                            c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        else:
                            c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, c0, c1, c2, c3)
                        sums[4 * u], sums[4 * u + 1], sums[4 * u + 2], sums[4 * u + 3] = c0, c1, c2, c3

    return accumulate


def make_project(shape: PersistentShape, load_ahead: Any, epilogue: Any) -> Any:
    """Device function (state, first_work_tile, thread, shared, progress): all of a projection but the staging of x.

    Arguments: state, `OpState`; first_work_tile, of the CTA; shared, `SharedMemory`; progress, uint32 [2]
    (`BUFFER`, `CONSUMED`).

    Args:
        load_ahead: device function (kind, state, work_tile, entry, loaded): issue the loads that the epilogue of this
            entry needs, into four words; called before the wait for the weights.
        epilogue: device function (state, work_tile, entry, loaded, floats, sums): reduce and store the rows of a work
            tile that one thread finishes, an entry: one row of logits, two rows otherwise, four of gate and up. The
            partial sum of row r of the tile's n-th stage is at floats[sums + 16 * n + r], where rows 8-15 of an 8-row
            work tile are its rows 0-7 over the next k-tile.
    """
    ctas, full_start, empty_start = shape.sms, shape.full_start, shape.empty_start
    partials, partial_words = shape.partials_start, shape.partial_words
    work_tiles_of = shape.by_kind(lambda plan: plan.work_tiles)
    round_work_tiles_of = shape.by_kind(lambda plan: plan.round_work_tiles)
    stages_of = shape.by_kind(lambda plan: plan.work_tile_stages)
    half_tiles_of = shape.by_kind(lambda plan: int(plan.half_tiles))
    last_groups_of = shape.by_kind(lambda plan: plan.layout.last_k_tile_groups)
    bits_of, x_words = shape.by_kind(lambda plan: plan.epilogue_bits), _X_WORDS
    consume_stage = _make_consume_stage(shape)

    @ptx.device_function
    def split_entry(entry, bits):
        """Work tile of the round, from 0 on, and the entry of that work tile."""
        round_tile = u32(entry >> bits)
        return round_tile, u32(entry - (round_tile << bits))

    @ptx.large_device_function
    def project(state, first_work_tile, thread, shared, progress):
        loaded = cuda.local.array(4, uint32)
        # Unsigned 32 bits: the compiler need not handle negative indices.
        thread_index, step = u32(thread), u32(ctas)
        lane, warp = u32(thread_index & u32(31)), u32(thread_index >> u32(5))
        full, empty = ptx.shared_address(shared.barriers, full_start), ptx.shared_address(shared.barriers, empty_start)
        k_tiles, round_work_tiles = u32(stages_of(state.kind)), u32(round_work_tiles_of(state.kind))
        half_tiles = u32(half_tiles_of(state.kind))
        high_rows_offset = u32(half_tiles * x_words)
        bits = u32(bits_of(state.kind))
        sizes = StageSizes(k_tiles, last_groups_of(state.kind), half_tiles, high_rows_offset)
        start = u32(first_work_tile)
        remaining = u32((u32(work_tiles_of(state.kind)) - start + step - u32(1)) // step)
        while remaining > u32(0):
            round_size = min(round_work_tiles, remaining)
            sums = u32(u32(partials) + progress[BUFFER] * u32(partial_words))
            # By all threads: a branch would wait for what is loaded in it.
            entries = u32(round_size << bits)
            entry = min(thread_index, u32(entries - u32(1)))
            round_tile, tile_entry = split_entry(entry, bits)
            load_ahead(state.kind, state, u32(start + round_tile * step), tile_entry, loaded)
            q, k_tile = warp, warp
            while k_tile >= k_tiles:
                k_tile = u32(k_tile - k_tiles)
            while q < u32(round_size * k_tiles):
                n = u32(progress[CONSUMED] + q)
                total = consume_stage(state, sizes, thread, lane, shared, full, empty, n, k_tile)
                if lane & u32(1) == u32(0):
                    row = (lane >> u32(2)) + (lane & u32(2)) * u32(4)
                    shared.floats[u32(sums + q * u32(16) + row)] = total
                q = u32(q + u32(CONSUMER_WARPS))
                k_tile = u32(k_tile + u32(CONSUMER_WARPS))
                while k_tile >= k_tiles:
                    k_tile = u32(k_tile - k_tiles)
            progress[CONSUMED] = u32(progress[CONSUMED] + round_size * k_tiles)
            sync_consumers()
            entry = thread_index
            while entry < entries:
                round_tile, tile_entry = split_entry(entry, bits)
                work_tile = u32(start + round_tile * step)
                if entry != thread_index:
                    load_ahead(state.kind, state, work_tile, tile_entry, loaded)
                tile_sums = u32(sums + round_tile * k_tiles * u32(16))
                epilogue(state, work_tile, tile_entry, loaded, shared.floats, tile_sums)
                entry = u32(entry + u32(CONSUMER_THREADS))
            progress[BUFFER] = u32(progress[BUFFER] ^ u32(1))
            start = u32(start + round_size * step)
            remaining = u32(remaining - round_size)

    return project


def _make_consume_stage(shape: PersistentShape) -> Any:
    """Device function (state, sizes, thread, lane, shared, full, empty, n, k_tile) -> the partial sums of stage n of
    the CTA, which holds this k-tile of a work tile: wait until it is full, multiply, and release it.

    Arguments: sizes, `StageSizes`; full and empty, addresses of the first full and the first empty barrier.
    """
    stages, trace, ops, x_start = shape.stages, shape.trace, shape.ops, shape.x_start
    fp16 = shape.lm_head.format.bits == 16
    multiply = make_multiply(shape, fp16=False)
    multiply_fp16 = make_multiply(shape, fp16=True) if fp16 else multiply
    x_words = _X_WORDS

    @ptx.device_function
    def consume_stage(state, sizes, thread, lane, shared, full, empty, n, k_tile):
        words, floats, barriers = shared.words, shared.floats, shared.barriers
        phase = u32(n // u32(stages))
        stage = u32(n - phase * u32(stages))
        begun = ptx.cycles() if trace else np.uint64(0)
        await_barrier(barriers, full + stage * u32(8), phase & u32(1), state.watchdog)
        if trace and thread == 0:
            index = (int64(cuda.blockIdx.x) * ops + state.op) * EVENTS + WAITED
            state.timestamps[index] += int64(ptx.cycles() - begun)
        groups = sizes.last_groups if k_tile == u32(sizes.k_tiles - u32(1)) else np.int32(K_TILE_GROUPS)
        if fp16 and state.kind == LM_HEAD:
            x = u32(u32(x_start) + (k_tile * x_words >> u32(1)))
            total = multiply_fp16(words, floats, stage, x, sizes.high_rows_offset, groups, lane)
        else:
            x = u32(u32(x_start) + (k_tile * x_words << sizes.half_tiles))
            total = multiply(words, floats, stage, x, sizes.high_rows_offset, groups, lane)
        ptx.sync_warp()
        if lane == u32(0):
            ptx.barrier_arrive(barriers, empty + stage * u32(8))
        return total

    return consume_stage


def make_row_sum(shape: PersistentShape, kind: int) -> Any:
    """Device function (floats, sums, row) -> a row's sum over all k-tiles, in their order."""
    plan = shape.plans[kind]
    stages, half_tiles = plan.work_tile_stages, plan.half_tiles

    @ptx.device_function
    def row_sum(floats, sums, row):
        total = _ZERO
        for stage in range(stages):
            total += floats[sums + stage * 16 + row]
            if half_tiles:
                total += floats[sums + stage * 16 + row + 8]
        return total

    return row_sum
