"""A projection of the persistent kernel for several columns (tokens): weights pass once, each fragment of them meets
all columns.

A column's sums have the order of `projection.py`, bit for bit: 8 products of the tensor cores per group of 128 weights
along K, from a zero accumulator; the four groups of a k-tile, scaled, in pairs; then the k-tiles in their order. What
differs is the B operand of the mma. There it is four groups of one vector; here its 8 columns are the tokens, so that
every group has fragments of its own. Up to 4 tokens occupy columns 0-3 and again 4-7, which are for rows 8-15 of a
stage: with 8-row work tiles these are rows 0-7 of the next k-tile. With 8 tokens there is no room for that, and all
work tiles have 16 rows.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.layout.weights import HALF_GROUP_WORDS
from numba_atomflow.ops.cuda.persistent.pipeline import await_barrier
from numba_atomflow.ops.cuda.persistent.projection import BUFFER, CONSUMED, StageSizes, is_even, make_load_codes
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    K_TILE_GROUPS,
    LM_HEAD,
    MAX_COLUMNS,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import swizzled, sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, WAITED
from numba_atomflow.ops.cuda.scalars import u32

_ZERO, _MINUS_ZERO = np.float32(0.0), np.float32(-0.0)
_X_WORDS = u32(K_TILE_GROUPS * 64)  # of x, for a k-tile


class ColumnsState(NamedTuple):
    """What the epilogue of a projection reads and writes beside its sums.

    Attributes:
        mailbox, cache16, logits, timestamps: as in `WideArguments`.
        vectors: `LayerVectors`.
        op: its number. kind: of projection.
        input_flag, flag: of the residual stream at the layer's start, and of the layer's results.
        position: of the first column.
        keys_start, values_start: elements of `cache16` at which the layer's keys and values begin.
        best: the thread's own int64 [1], the largest sort key of its logits, which are all of one column.
        watchdog: `Watchdog`.
    """

    mailbox: Any
    vectors: Any
    cache16: Any
    logits: Any
    timestamps: Any
    op: Any
    kind: Any
    input_flag: Any
    flag: Any
    position: Any
    keys_start: Any
    values_start: Any
    best: Any
    watchdog: Any


def _make_multiply(shape: PersistentShape, *, fp16: bool) -> Any:
    """Device function (words, floats, stage, x, high_rows_offset, groups, lane, target): the partial sums of a stage,
    to floats[target + row * columns + column].

    Arguments: x, the word of shared memory at which the first column's elements for the stage begin; high_rows_offset,
    words from there to the elements for rows 8-15; groups, groups of 128 weights in the k-tile.
    """
    load_codes, accumulate = make_load_codes(shape, fp16=fp16), _make_accumulate(shape, fp16=fp16)
    even, stage_words, columns, pitch = is_even(shape, fp16=fp16), shape.stage_words, shape.columns, shape.x_pitch
    both_rows = columns == MAX_COLUMNS  # a lane has results of row g and of row g + 8
    code_registers, sum_registers = 16 * K_TILE_GROUPS, 4 * K_TILE_GROUPS

    @ptx.device_function
    def scaled_sum(floats, scale, v0, v1, v2, v3, count):
        """The sum over the groups of a k-tile, whose scales are 8 words apart."""
        if even and not fp16:
            v0, v1 = v0 * floats[scale], v1 * floats[u32(scale + u32(8))]
            v2, v3 = v2 * floats[u32(scale + u32(16))], v3 * floats[u32(scale + u32(24))]
        elif not fp16:
            # Products that are rounded, as those are that `projection.py` has in branches.
            v0 = ptx.fma(v0, floats[scale], _MINUS_ZERO)
            if u32(1) < count:
                v1 = ptx.fma(v1, floats[u32(scale + u32(8))], _MINUS_ZERO)
            if u32(2) < count:
                v2 = ptx.fma(v2, floats[u32(scale + u32(16))], _MINUS_ZERO)
            if u32(3) < count:
                v3 = ptx.fma(v3, floats[u32(scale + u32(24))], _MINUS_ZERO)
        return (v0 + v1) + (v2 + v3)

    @ptx.large_device_function
    def multiply(words, floats, stage, x, high_rows_offset, groups, lane, target):
        codes = cuda.local.array(code_registers, uint32)
        sums = cuda.local.array(sum_registers, float32)
        g, t = u32(lane >> u32(2)), u32(lane & u32(3))
        start = u32(stage * u32(stage_words))
        count = u32(K_TILE_GROUPS if even else groups)
        second = u32(start + count * u32(HALF_GROUP_WORDS))  # of rows 8-15: codes, then scales
        load_codes(words, start, second, groups, lane, codes)
        for i in range(sum_registers):
            sums[i] = _ZERO
        if both_rows:
            column = u32(g * u32(pitch))
        else:
            column = u32((g & u32(columns - 1)) * u32(pitch) + (g >> u32(2)) * high_rows_offset)
        accumulate(words, x, column, t, groups, codes, sums)
        low_scales, high_scales = u32(start + count * u32(256) + g), u32(second + count * u32(256) + g)
        if both_rows:
            base = u32(target + g * u32(columns) + u32(2) * t)
            floats[base] = scaled_sum(floats, low_scales, sums[0], sums[4], sums[8], sums[12], count)
            floats[u32(base + u32(1))] = scaled_sum(floats, low_scales, sums[1], sums[5], sums[9], sums[13], count)
            base = u32(base + u32(8 * columns))
            floats[base] = scaled_sum(floats, high_scales, sums[2], sums[6], sums[10], sums[14], count)
            floats[u32(base + u32(1))] = scaled_sum(floats, high_scales, sums[3], sums[7], sums[11], sums[15], count)
        else:
            # Lanes t < 2 have columns 0-3, of row g; the others columns 4-7, of which they take those of row g + 8.
            high_rows = t >= u32(2)
            scales = high_scales if high_rows else low_scales
            v0, w0 = (sums[2], sums[3]) if high_rows else (sums[0], sums[1])
            v1, w1 = (sums[6], sums[7]) if high_rows else (sums[4], sums[5])
            v2, w2 = (sums[10], sums[11]) if high_rows else (sums[8], sums[9])
            v3, w3 = (sums[14], sums[15]) if high_rows else (sums[12], sums[13])
            first = scaled_sum(floats, scales, v0, v1, v2, v3, count)
            other = scaled_sum(floats, scales, w0, w1, w2, w3, count)
            first_column = u32(u32(2) * (t & u32(1)))
            if first_column < u32(columns):
                row = u32(g + u32(8) * (t >> u32(1)))
                base = u32(target + row * u32(columns) + first_column)
                floats[base], floats[u32(base + u32(1))] = first, other

    return multiply


def _make_accumulate(shape: PersistentShape, *, fp16: bool) -> Any:
    """Device function (words, x, column, t, groups, codes, sums): multiply the groups of a k-tile by the fragments of
    the lane's column, whose elements begin at word x + column.
    """
    even, fragments = is_even(shape, fp16=fp16), 2 if fp16 else 4  # of 16 bytes, of a group of x
    x_step = 32 if fp16 else 64  # words of x per group

    @ptx.device_function
    def accumulate(words, x, column, t, groups, codes, sums):
        for u in range(K_TILE_GROUPS):
            if even or u < groups:
                for i in range(fragments):
                    unit = u32(4 * i + t) if fp16 else u32(i // 2 * 8 + i % 2 + 2 * t)
                    at = u32(column + u32(u * x_step) + unit * u32(4))
                    b0, b1, b2, b3 = ptx.load_shared_16(words, u32(x + swizzled(at)))
                    for k in range(2):
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


def make_project_columns(shape: PersistentShape, load_ahead: Any, epilogue: Any) -> Any:
    """Device function (state, first_work_tile, thread, shared, progress): all of a projection but the staging of x.

    Arguments: state, `ColumnsState`; first_work_tile, of the CTA; shared, `SharedMemory`; progress, uint32 [2]
    (`BUFFER`, `CONSUMED`).

    Args:
        load_ahead, epilogue: as `projection.make_project` has them, with the column after the entry.
    """
    ctas, full_start, empty_start, columns = shape.sms, shape.full_start, shape.empty_start, shape.columns
    column_bits = columns.bit_length() - 1
    partials, partial_words, stage_sums = shape.partials_start, shape.partial_words, 16 * columns
    work_tiles_of = shape.by_kind(lambda plan: plan.work_tiles)
    round_work_tiles_of = shape.by_kind(lambda plan: plan.round_work_tiles)
    stages_of = shape.by_kind(lambda plan: plan.work_tile_stages)
    half_tiles_of = shape.by_kind(lambda plan: int(plan.half_tiles))
    last_groups_of = shape.by_kind(lambda plan: plan.layout.last_k_tile_groups)
    bits_of, x_words = shape.by_kind(lambda plan: plan.epilogue_bits), _X_WORDS
    consume_stage = _make_consume_stage(shape)

    @ptx.device_function
    def split_entry(entry, bits):
        """Work tile of the round, from 0 on, the entry of that work tile, and the column."""
        column = u32(entry & u32(columns - 1))
        tile_entry = u32(entry >> u32(column_bits))
        round_tile = u32(tile_entry >> bits)
        return round_tile, u32(tile_entry - (round_tile << bits)), column

    @ptx.large_device_function
    def project(state, first_work_tile, thread, shared, progress):
        loaded = cuda.local.array(4, uint32)
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
            entries = u32((round_size << bits) << u32(column_bits))
            round_tile, tile_entry, column = split_entry(min(thread_index, u32(entries - u32(1))), bits)
            load_ahead(state.kind, state, u32(start + round_tile * step), tile_entry, column, loaded)
            q, k_tile = warp, warp
            while k_tile >= k_tiles:
                k_tile = u32(k_tile - k_tiles)
            while q < u32(round_size * k_tiles):
                n = u32(progress[CONSUMED] + q)
                target = u32(sums + q * u32(stage_sums))
                consume_stage(state, sizes, thread, lane, shared, full, empty, n, k_tile, target)
                q = u32(q + u32(CONSUMER_WARPS))
                k_tile = u32(k_tile + u32(CONSUMER_WARPS))
                while k_tile >= k_tiles:
                    k_tile = u32(k_tile - k_tiles)
            progress[CONSUMED] = u32(progress[CONSUMED] + round_size * k_tiles)
            sync_consumers()
            entry = thread_index
            while entry < entries:
                round_tile, tile_entry, column = split_entry(entry, bits)
                work_tile = u32(start + round_tile * step)
                if entry != thread_index:
                    load_ahead(state.kind, state, work_tile, tile_entry, column, loaded)
                tile_sums = u32(sums + round_tile * k_tiles * u32(stage_sums))
                epilogue(state, work_tile, tile_entry, column, loaded, shared.floats, tile_sums)
                entry = u32(entry + u32(CONSUMER_THREADS))
            progress[BUFFER] = u32(progress[BUFFER] ^ u32(1))
            start = u32(start + round_size * step)
            remaining = u32(remaining - round_size)

    return project


def _make_consume_stage(shape: PersistentShape) -> Any:
    """Device function (state, sizes, thread, lane, shared, full, empty, n, k_tile, target): stage n of the CTA, which
    holds this k-tile of a work tile: wait until it is full, multiply, release it; its sums to floats[target ..].

    Arguments: sizes, `StageSizes`; full and empty, addresses of the first full and the first empty barrier.
    """
    stages, trace, ops, x_start, x_words = shape.stages, shape.trace, shape.ops, shape.x_start, _X_WORDS
    fp16 = shape.lm_head.format.bits == 16
    multiply = _make_multiply(shape, fp16=False)
    multiply_fp16 = _make_multiply(shape, fp16=True) if fp16 else multiply

    @ptx.device_function
    def consume_stage(state, sizes, thread, lane, shared, full, empty, n, k_tile, target):
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
            multiply_fp16(words, floats, stage, x, sizes.high_rows_offset, groups, lane, target)
        else:
            x = u32(u32(x_start) + (k_tile * x_words << sizes.half_tiles))
            multiply(words, floats, stage, x, sizes.high_rows_offset, groups, lane, target)
        ptx.sync_warp()
        if lane == u32(0):
            ptx.barrier_arrive(barriers, empty + stage * u32(8))

    return consume_stage


def make_row_sum(shape: PersistentShape, kind: int) -> Any:
    """Device function (floats, sums, row, column, total) -> total plus the sums of a row and column over the k-tiles of
    a work tile, in their order. total: 0, or over the k-tiles before them.
    """
    plan, columns = shape.plans[kind], shape.columns
    stages, half_tiles = plan.work_tile_stages, plan.half_tiles

    @ptx.device_function
    def row_sum(floats, sums, row, column, total):
        for stage in range(stages):
            total += floats[sums + (stage * 16 + row) * columns + column]
            if half_tiles:
                total += floats[sums + (stage * 16 + row + 8) * columns + column]
        return total

    return row_sum
