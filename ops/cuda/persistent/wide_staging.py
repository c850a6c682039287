"""The inputs of a projection for several columns (tokens), staged in shared memory as float16, `shape.x_pitch` words
from one to the next.

A column has the bits that `staging.py` gives to a step of one token: a thread has the same elements of it, and the sums
of the norm have the same order. The inputs of `o` and `down` are copied. The words of several columns are loaded
together, so that their latencies overlap.
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import has_pair_flag, unpack_pair, watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    DOWN,
    GATE_UP,
    O_PROJ,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import swizzled, sync_consumers
from numba_atomflow.ops.cuda.persistent.wide_vectors import all_arrived
from numba_atomflow.ops.cuda.scalars import i32, u32

_LOADS = 20  # of 16 bytes, that a thread has in flight
_PAIR_LOADS = 32  # the same of two batches of columns that are normalised
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def _make_await_sample(shape: PersistentShape, has_arrived: Any) -> Any:
    """Device function (words, start, flag, thread, watchdog): one warp polls a sample of 32 until all have arrived,
    while the others wait: if every CTA polled all words, L2's queues would fill.

    Args:
        has_arrived: device function (words, start, flag, i): whether number i of the sample has.
    """
    interval = shape.poll_interval_ns

    @ptx.device_function
    def await_sample(words, start, flag, thread, watchdog):
        polls = u32(0)
        if thread < 32:
            missing, waiting = u32(32), True
            while missing > u32(0):
                if waiting:
                    waiting = not has_arrived(words, start, flag, thread)
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(watchdog, polls):
                    waiting = False
                missing = u32(ptx.count_lanes(u32(waiting)))
                if missing > u32(0):
                    ptx.nanosleep(u32(interval))
        sync_consumers()

    return await_sample


def make_stage_norms(shape: PersistentShape, padded: int) -> Any:
    """Device function (mailbox, start, flag, norm, thread, shared, watchdog): x is the RMSNorm of the residual stream,
    for every column.

    Arguments: start, word of the mailbox at which the residual stream begins, as pairs; norm, `NormWeight`.

    Args:
        padded: elements of x with padding.
    """
    width, x_start, x_pitch, reduction_start = shape.hidden, shape.x_start, shape.x_pitch, shape.reduction_start
    columns, interval, words_per_column = shape.columns, shape.poll_interval_ns, shape.hidden // 2
    quads, all_quads = width // 4, padded // 4
    input_rounds, rounds = -(-quads // CONSUMER_THREADS), -(-all_quads // CONSUMER_THREADS)
    batch = min(columns, max(1, 1 << (_LOADS // input_rounds).bit_length() - 1)) if input_rounds <= _LOADS else 1
    # Two batches are received together where registers are enough, so that there are two round trips to L2 less.
    pair = columns > batch and 2 * batch * input_rounds <= _PAIR_LOADS
    gain_registers, registers = 4 * input_rounds, 4 * input_rounds * batch
    more_registers = registers if pair else 1
    stride = max(1, columns * quads // 32)
    inverse_width, epsilon, load = np.float32(1.0 / width), np.float32(shape.eps), make_exchange(shape.ranks).load

    @ptx.device_function
    def has_arrived(mailbox, start, flag, i):
        _, high0, _, high1 = load(mailbox, start + 2 * min(i * stride, columns * quads - 1))
        return has_pair_flag(high0, flag) and has_pair_flag(high1, flag)

    await_sample = _make_await_sample(shape, has_arrived)

    @ptx.device_function
    def load_words(mailbox, start, thread, received):
        """The words of `batch` columns."""
        for column in range(batch):
            for i in range(input_rounds):
                quad = min(i * CONSUMER_THREADS + thread, quads - 1)
                w0, w1, w2, w3 = load(mailbox, start + column * words_per_column + 2 * quad)
                base = 4 * (column * input_rounds + i)
                received[base], received[base + 1], received[base + 2], received[base + 3] = w0, w1, w2, w3

    @ptx.device_function
    def is_missing(received, flag):
        """Whether a word of `batch` columns has not arrived."""
        missing = False
        for load in range(batch * input_rounds):
            if not (has_pair_flag(received[4 * load + 1], flag) and has_pair_flag(received[4 * load + 3], flag)):
                missing = True
        return missing

    @ptx.device_function
    def receive(mailbox, start, flag, thread, received, more, watchdog):
        """The words of `batch` columns, and with `pair` of as many more."""
        polls, waiting = u32(0), True
        while waiting:
            load_words(mailbox, start, thread, received)
            if pair:
                load_words(mailbox, start + batch * words_per_column, thread, more)
            waiting = is_missing(received, flag)
            if pair and is_missing(more, flag):
                waiting = True
            polls = u32(polls + u32(1))
            if waiting:
                ptx.nanosleep(u32(interval))
                if watchdog_trips(watchdog, polls):
                    waiting = False

    @ptx.device_function
    def store_squares(received, first, thread, floats):
        """Each warp's sum of squares of `batch` columns."""
        for column in range(batch):
            squares = _ZERO
            for i in range(input_rounds):
                base = 4 * (column * input_rounds + i)
                a, b = unpack_pair(received[base], received[base + 1])
                c, d = unpack_pair(received[base + 2], received[base + 3])
                if i * CONSUMER_THREADS + thread < quads:
                    squares += (a * a + b * b) + (c * c + d * d)
            squares = ptx.warp_sum(squares)
            if thread & 31 == 0:
                floats[reduction_start + (first + column) * CONSUMER_WARPS + (thread >> 5)] = squares

    @ptx.device_function
    def store_norms(received, gains, first, thread, shared):
        words, floats = shared.words, shared.floats
        for column in range(batch):
            squares = _ZERO
            for warp in range(CONSUMER_WARPS):
                squares += floats[reduction_start + (first + column) * CONSUMER_WARPS + warp]
            factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
            for i in range(rounds):
                quad = i * CONSUMER_THREADS + thread
                index = x_start + swizzled((first + column) * x_pitch + 2 * quad)
                if i < input_rounds and quad < quads:
                    base = 4 * (column * input_rounds + i)
                    a, b = unpack_pair(received[base], received[base + 1])
                    words[index] = ptx.pack_f16x2(a * factor * gains[4 * i], b * factor * gains[4 * i + 1])
                    a, b = unpack_pair(received[base + 2], received[base + 3])
                    words[index + 1] = ptx.pack_f16x2(a * factor * gains[4 * i + 2], b * factor * gains[4 * i + 3])
                elif quad < all_quads:
                    words[index] = u32(0)
                    words[index + 1] = u32(0)

    @ptx.large_device_function
    def stage_norms(mailbox, start, flag, norm, thread, shared, watchdog):
        gains = cuda.local.array(gain_registers, float32)
        received = cuda.local.array(registers, uint32)
        more = cuda.local.array(more_registers, uint32)
        for i in range(input_rounds):
            quad = i * CONSUMER_THREADS + thread
            if quad < quads:
                w0, w1, w2, w3 = ptx.load_16(norm.weights, norm.start + quad * 4)
                gains[4 * i], gains[4 * i + 1] = ptx.bits_f32(w0), ptx.bits_f32(w1)
                gains[4 * i + 2], gains[4 * i + 3] = ptx.bits_f32(w2), ptx.bits_f32(w3)
        await_sample(mailbox, start, flag, thread, watchdog)
        first = i32(0)
        while first < columns:
            receive(mailbox, start + first * words_per_column, flag, thread, received, more, watchdog)
            store_squares(received, first, thread, shared.floats)
            if pair:
                store_squares(more, i32(first + batch), thread, shared.floats)
            sync_consumers()
            store_norms(received, gains, first, thread, shared)
            if pair:
                store_norms(more, gains, i32(first + batch), thread, shared)
            first = i32(first + batch * (1 + pair))
        sync_consumers()

    return stage_norms


def make_stage_copies(shape: PersistentShape, width: int, padded: int, pitch: int, early: int = 0) -> Any:
    """Device function (vectors, start, thread, words, watchdog): x is, for every column, a vector of `LayerVectors`.

    Arguments: vectors, words of all layers; start, of the first column's vector.

    Args:
        width, padded: elements of x without and with padding. pitch: words from one column's vector to the next.
        early: elements of each column that have arrived before the rest; they are loaded while the rest is awaited.
    """
    x_start, x_pitch, columns, interval = shape.x_start, shape.x_pitch, shape.columns, shape.poll_interval_ns
    quads, padding = width // 8, (padded - width) // 8  # quads: of words
    padding_or_one = max(padding, 1)  # a divisor, also where there is none
    piece = math.gcd(quads, 32)  # quads of a column that are loaded side by side, before those of the next column
    all_quads = columns * quads
    all_loads = -(-all_quads // CONSUMER_THREADS)
    rounds = -(-all_loads // _LOADS)
    loads = -(-all_loads // rounds)  # as many in each round
    registers, step = 4 * loads, loads * CONSUMER_THREADS
    early_loads = min(loads, early // 8 // piece * piece * columns // CONSUMER_THREADS)
    awaited = early_loads * CONSUMER_THREADS  # the first quad of the rest
    stride, load_vector = max(1, (all_quads - awaited) // 32), make_exchange(shape.ranks).load_vector

    @ptx.device_function
    def place(unit):
        """Column and quad: all columns of a part of K before those of the next."""
        row = u32(unit) // u32(piece)
        column = i32(row % u32(columns))
        return column, i32(u32(row // u32(columns)) * u32(piece) + u32(unit) % u32(piece))

    @ptx.device_function
    def word_of(unit):
        column, quad = place(unit)
        return i32(column * pitch + 4 * quad)

    @ptx.device_function
    def has_arrived(vectors, start, flag, i):
        unit = min(i32(awaited + i * stride), i32(all_quads - 1))
        w0, w1, w2, w3 = load_vector(vectors, start + word_of(unit))
        return all_arrived(w0, w1, w2, w3)

    await_sample = _make_await_sample(shape, has_arrived)

    @ptx.device_function
    def load(vectors, start, first, load_start, load_end, received):
        for i in range(load_start, load_end):
            unit = min(i32(first + i * CONSUMER_THREADS), i32(all_quads - 1))
            w0, w1, w2, w3 = load_vector(vectors, start + word_of(unit))
            received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3] = w0, w1, w2, w3

    @ptx.device_function
    def is_missing(received):
        missing = False
        for i in range(loads):
            if not all_arrived(received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3]):
                missing = True
        return missing

    @ptx.device_function
    def store(first, received, words):
        for i in range(loads):
            unit = i32(first + i * CONSUMER_THREADS)
            if unit < all_quads:
                column, quad = place(unit)
                index = x_start + swizzled(column * x_pitch + 4 * quad)
                w0, w1, w2, w3 = received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3]
                ptx.store_shared_16(words, index, w0, w1, w2, w3)

    @ptx.large_device_function
    def stage_copies(vectors, start, thread, words, watchdog):
        received = cuda.local.array(registers, uint32)
        first, polls = i32(thread), u32(0)
        load(vectors, start, first, 0, early_loads, received)
        await_sample(vectors, start, u32(0), thread, watchdog)
        load(vectors, start, first, early_loads, loads, received)
        while first < all_quads:
            waiting = is_missing(received)
            while waiting:
                ptx.nanosleep(u32(interval))
                load(vectors, start, first, 0, loads, received)
                polls = u32(polls + u32(1))
                waiting = is_missing(received) and not watchdog_trips(watchdog, polls)
            store(first, received, words)
            first = i32(first + step)
            if rounds > 1 and first < all_quads:
                load(vectors, start, first, 0, loads, received)
        entry = i32(thread)
        while entry < columns * padding:
            column = i32(entry // padding_or_one)
            index = x_start + swizzled(column * x_pitch + 4 * (quads + entry - column * padding))
            ptx.store_shared_16(words, index, u32(0), u32(0), u32(0), u32(0))
            entry = i32(entry + CONSUMER_THREADS)
        sync_consumers()

    return stage_copies


def make_stage_columns(shape: PersistentShape) -> Any:
    """Device function (kind, work_tile, mailbox, vectors, input_flag, flag, norm, thread, shared, watchdog): stage the
    inputs of a projection of this kind. work_tile: the CTA's first; vectors: `LayerVectors`. The other arguments are
    those of `staging.make_stage`.
    """
    offsets, attn_width, intermediate = shape.mailbox, shape.o.in_features, shape.down.in_features
    k_halves, half_words, intermediate_start = shape.plans[DOWN].k_halves, intermediate // 4, shape.attn_out_words
    stage_norms = make_stage_norms(shape, shape.qkv.padded_in_features)
    stage_attn_out = make_stage_copies(shape, attn_width, shape.o.padded_in_features, attn_width // 2)
    down_width = intermediate // (1 + k_halves)
    # Of two halves of K the second comes later: what arrives early of it is little, while all of the first has.
    early = max(0, shape.early_intermediate - intermediate + down_width)
    staged = shape.plans[DOWN].staged_features
    stage_intermediate = make_stage_copies(shape, down_width, staged, intermediate // 2, early)

    @ptx.large_device_function
    def stage(kind, work_tile, mailbox, vectors, input_flag, flag, norm, thread, shared, watchdog):
        if kind == O_PROJ:
            stage_attn_out(vectors.words, vectors.start, thread, shared.words, watchdog)
        elif kind == DOWN:
            start = vectors.start + intermediate_start
            if k_halves:
                start += (work_tile & 1) * half_words
            stage_intermediate(vectors.words, start, thread, shared.words, watchdog)
        else:
            start, norm_flag = (offsets.residual_mid, flag) if kind == GATE_UP else (offsets.residual_in, input_flag)
            stage_norms(mailbox, start, norm_flag, norm, thread, shared, watchdog)

    return stage
