"""The input of a projection, staged in shared memory as float16: polled from the mailbox and, if need be, normalised.

Padding along K is set to zero, which the weights' padding is, too (zero times NaN would be NaN).
"""

import math
from typing import Any, NamedTuple

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
from numba_atomflow.ops.cuda.scalars import u32

CONSUMER_BARRIER = 1  # number of the named barrier of the consumer warps; the producer takes no part

_MAX_MISSING = 8  # of 32 sampled words: when no more are missing, all words are polled
_NARROW_QUADS = 1024  # a vector of at most so many quads (two mailbox words each) arrives almost at once
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class SharedMemory(NamedTuple):
    """Views of the CTA's dynamic shared memory, all from its beginning on.

    Attributes:
        words: uint32. halves: uint16, bits of float16. floats: float32. keys: int64. barriers: uint64.
    """

    words: Any
    halves: Any
    floats: Any
    keys: Any
    barriers: Any


class NormWeight(NamedTuple):
    """The weight of an RMSNorm.

    Attributes:
        weights: all weights of the model, 32-bit words. start: word at which the norm's begins.
    """

    weights: Any
    start: Any


@ptx.device_function
def sync_consumers():
    """Barrier of all consumer warps: what they wrote to shared memory becomes visible to the others."""
    ptx.named_barrier_sync(u32(CONSUMER_BARRIER), u32(CONSUMER_THREADS))


@ptx.device_function
def swizzled(word):
    """Position of word `word` of x, from its beginning on: neighbouring groups of 128 elements are read side by side,
    and would have bank conflicts. (Of the groups of 64 of float16 weights, only every other pair is free of them.)
    """
    return word ^ (word >> 4 & 4)


def make_receive(shape: PersistentShape, quads: int, *, pairs: bool) -> Any:
    """Device function (mailbox, start, flag, thread, received, watchdog): poll `quads` times two words from word
    `start` on until all have the flag; those of quad i * CONSUMER_THREADS + thread go to received[4 i .. 4 i + 3].

    First one warp polls a sample of 32, spread over all, while the others wait at a barrier: if every CTA polled all
    words, L2's queues would fill up. When most of the sample have arrived, the rest have, too, or are about to; of a
    wide vector, whose words take longer, when the whole sample has.
    """
    rounds, interval, sample_stride = -(-quads // CONSUMER_THREADS), shape.poll_interval_ns, max(1, quads // 32)
    max_missing = _MAX_MISSING if quads <= _NARROW_QUADS else 0
    load = make_exchange(shape.ranks).load

    @ptx.device_function
    def has_flag(high0, high1, flag):
        return has_pair_flag(high0, flag) and has_pair_flag(high1, flag) if pairs else high0 == flag and high1 == flag

    @ptx.device_function
    def receive(mailbox, start, flag, thread, received, watchdog):
        polls = u32(0)
        if thread < 32:
            missing, waiting = u32(32), True
            while missing > u32(max_missing):
                if waiting:
                    _, high0, _, high1 = load(mailbox, start + 2 * min(thread * sample_stride, quads - 1))
                    waiting = not has_flag(high0, high1, flag)
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(watchdog, polls):
                    waiting = False
                missing = u32(ptx.count_lanes(u32(waiting)))
                if missing > u32(max_missing):
                    ptx.nanosleep(u32(interval))
        sync_consumers()
        waiting = True
        while waiting:
            for i in range(rounds):
                quad = min(i * CONSUMER_THREADS + thread, quads - 1)
                w0, w1, w2, w3 = load(mailbox, start + 2 * quad)
                received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3] = w0, w1, w2, w3
            waiting = False
            for i in range(rounds):
                if not has_flag(received[4 * i + 1], received[4 * i + 3], flag):
                    waiting = True
            polls = u32(polls + u32(1))
            if waiting:
                ptx.nanosleep(u32(interval))
                if watchdog_trips(watchdog, polls):
                    waiting = False

    return receive


def make_stage_norm(shape: PersistentShape, padded: int) -> Any:
    """Device function (mailbox, start, flag, norm, thread, shared, watchdog): x is the RMSNorm of the residual stream.

    Arguments: start, word of the mailbox at which the residual stream begins, as pairs; norm, `NormWeight`.

    Args:
        padded: elements of x with padding.
    """
    width, x_start, reduction_start = shape.hidden, shape.x_start, shape.reduction_start
    quads, all_quads = width // 4, padded // 4
    input_rounds, rounds = -(-quads // CONSUMER_THREADS), -(-all_quads // CONSUMER_THREADS)
    registers = 4 * input_rounds
    receive = make_receive(shape, quads, pairs=True)
    inverse_width, epsilon = np.float32(1.0 / width), np.float32(shape.eps)

    @ptx.large_device_function
    def stage_norm(mailbox, start, flag, norm, thread, shared, watchdog):
        words, floats = shared.words, shared.floats
        gains = cuda.local.array(registers, float32)
        values = cuda.local.array(registers, float32)
        received = cuda.local.array(registers, uint32)
        for i in range(input_rounds):
            quad = i * CONSUMER_THREADS + thread
            if quad < quads:
                w0, w1, w2, w3 = ptx.load_16(norm.weights, norm.start + quad * 4)
                gains[4 * i], gains[4 * i + 1] = ptx.bits_f32(w0), ptx.bits_f32(w1)
                gains[4 * i + 2], gains[4 * i + 3] = ptx.bits_f32(w2), ptx.bits_f32(w3)
        receive(mailbox, start, flag, thread, received, watchdog)
        squares = _ZERO
        for i in range(input_rounds):
            a, b = unpack_pair(received[4 * i], received[4 * i + 1])
            c, d = unpack_pair(received[4 * i + 2], received[4 * i + 3])
            values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3] = a, b, c, d
            if i * CONSUMER_THREADS + thread < quads:
                squares += (a * a + b * b) + (c * c + d * d)
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            floats[reduction_start + (thread >> 5)] = squares
        sync_consumers()
        squares = _ZERO
        for warp in range(CONSUMER_WARPS):
            squares += floats[reduction_start + warp]
        factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
        for i in range(rounds):
            quad = i * CONSUMER_THREADS + thread
            index = x_start + swizzled(2 * quad)
            if i < input_rounds and quad < quads:
                a, b = values[4 * i] * factor * gains[4 * i], values[4 * i + 1] * factor * gains[4 * i + 1]
                words[index] = ptx.pack_f16x2(a, b)
                a, b = values[4 * i + 2] * factor * gains[4 * i + 2], values[4 * i + 3] * factor * gains[4 * i + 3]
                words[index + 1] = ptx.pack_f16x2(a, b)
            elif quad < all_quads:
                words[index] = u32(0)
                words[index + 1] = u32(0)
        sync_consumers()

    return stage_norm


def make_stage_copy(shape: PersistentShape, width: int, padded: int) -> Any:
    """Device function (mailbox, start, flag, thread, words, watchdog): x is a vector of float16 pairs, as received."""
    x_start = shape.x_start
    quads, all_quads = width // 4, padded // 4
    input_rounds, rounds = -(-quads // CONSUMER_THREADS), -(-all_quads // CONSUMER_THREADS)
    registers = 4 * input_rounds
    receive = make_receive(shape, quads, pairs=False)

    @ptx.large_device_function
    def stage_copy(mailbox, start, flag, thread, words, watchdog):
        received = cuda.local.array(registers, uint32)
        receive(mailbox, start, flag, thread, received, watchdog)
        for i in range(rounds):
            quad = i * CONSUMER_THREADS + thread
            index = x_start + swizzled(2 * quad)
            if i < input_rounds and quad < quads:
                words[index], words[index + 1] = received[4 * i], received[4 * i + 2]
            elif quad < all_quads:
                words[index] = u32(0)
                words[index + 1] = u32(0)
        sync_consumers()

    return stage_copy


def make_stage(shape: PersistentShape) -> Any:
    """Device function (kind, mailbox, input_flag, flag, norm, x_norm, report, thread, shared, watchdog): stage the
    input of a projection of this kind.

    Arguments: input_flag, of the residual stream at the layer's start; flag, of the layer's results; norm,
    `NormWeight`; x_norm, for validators: with `report`, a normalised input is written there, too.
    """
    x_words, x_start, offsets = shape.hidden // 2, shape.x_start, shape.mailbox
    stage_norm = make_stage_norm(shape, shape.qkv.padded_in_features)
    stage_attn_out = make_stage_copy(shape, shape.o.in_features, shape.o.padded_in_features)
    stage_intermediate = make_stage_copy(shape, shape.down.in_features, shape.down.padded_in_features)

    @ptx.device_function
    def write(x_norm, thread, words):
        word = thread
        while word < x_words:
            x_norm[word] = words[x_start + swizzled(word)]
            word += CONSUMER_THREADS

    @ptx.large_device_function
    def stage(kind, mailbox, input_flag, flag, norm, x_norm, report, thread, shared, watchdog):
        if kind == O_PROJ:
            stage_attn_out(mailbox, offsets.attn_out, flag, thread, shared.words, watchdog)
        elif kind == DOWN:
            stage_intermediate(mailbox, offsets.intermediate, flag, thread, shared.words, watchdog)
        else:
            start, norm_flag = (offsets.residual_mid, flag) if kind == GATE_UP else (offsets.residual_in, input_flag)
            stage_norm(mailbox, start, norm_flag, norm, thread, shared, watchdog)
            if report:
                write(x_norm, thread, shared.words)

    return stage
