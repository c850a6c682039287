"""What a projection reads, brought into shared memory as float16: from the exchange, as soon as it is there.

Columns that pad the vector are set to zero, which the weights' padding is, too (zero times NaN would be NaN).
"""

import math
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import give_up, is_pair_of, pair_of
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMERS, THREADS, PersistentShape

CONSUMERS_MEET = 1  # number of the barrier at which the warps that compute meet: the producer takes no part

_FEW = 8  # of 32 words may be missing when all are asked for
_NARROW = 1024  # quads that take a moment
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@ptx.device_function
def meet():
    """All warps that compute arrive; what they wrote to shared memory is seen by the others."""
    ptx.named_barrier_sync(np.uint32(CONSUMERS_MEET), np.uint32(THREADS))


@ptx.device_function
def swizzled(word):
    """Where word `word` of x lies, from its beginning on: neighbouring groups of 128 columns are read side by side, and
    would be in the same banks. (Of the groups of 64 of float16 weights, only every other pair is kept apart.)
    """
    return word ^ (word >> 4 & 4)


def make_receive(shape: PersistentShape, quads: int, *, pairs: bool) -> Any:
    """Device function (exchange, start, epoch, thread, received, patience, fault): `quads` times two words from word
    `start` on, when they are all there; those of quad i * THREADS + thread go to received[4 i] .. received[4 i + 3].

    One warp looks for 32 of them, spread over all, while the others rest: all words asked for again and again by every
    block would fill the second-level cache's queues. When most of these are there, the others are, too, or will be in a
    moment; of a wide vector, whose words take long, when all are.
    """
    each, pause, spread = -(-quads // THREADS), shape.pause, max(1, quads // 32)
    few = _FEW if quads <= _NARROW else 0

    @ptx.device_function
    def is_there(e0, e1, epoch):
        return is_pair_of(e0, epoch) and is_pair_of(e1, epoch) if pairs else e0 == epoch and e1 == epoch

    @ptx.device_function
    def receive(exchange, start, epoch, thread, received, patience, fault):
        tries = np.uint32(0)
        if thread < 32:
            missing, lacks = np.uint32(32), True
            while missing > np.uint32(few):
                if lacks:
                    _, e0, _, e1 = ptx.ll_load(exchange, start + 2 * min(thread * spread, quads - 1))
                    lacks = not is_there(e0, e1, epoch)
                tries = np.uint32(tries + np.uint32(1))
                if lacks and give_up(patience, fault, tries):
                    lacks = False
                missing = np.uint32(ptx.count_lanes(np.uint32(lacks)))
                if missing > np.uint32(few):
                    ptx.nanosleep(np.uint32(pause))
        meet()
        waiting = True
        while waiting:
            for i in range(each):
                quad = min(i * THREADS + thread, quads - 1)
                w0, w1, w2, w3 = ptx.ll_load(exchange, start + 2 * quad)
                received[4 * i], received[4 * i + 1], received[4 * i + 2], received[4 * i + 3] = w0, w1, w2, w3
            waiting = False
            for i in range(each):
                if not is_there(received[4 * i + 1], received[4 * i + 3], epoch):
                    waiting = True
            tries = np.uint32(tries + np.uint32(1))
            if waiting:
                ptx.nanosleep(np.uint32(pause))
                if give_up(patience, fault, tries):
                    waiting = False

    return receive


def make_stage_norm(shape: PersistentShape, padded: int) -> Any:
    """Device function (exchange, start, epoch, weights, norm, thread, words, floats, patience, fault): x is the
    RMSNorm of the residual stream.

    Args of it: the residual stream as pairs from word `start` of the exchange on; the norm's weights from word `norm`
    of `weights` on. padded: columns of x with padding.
    """
    width, x_start, scalars = shape.hidden, shape.x_start, shape.scalars_start
    quads, all_quads = width // 4, padded // 4
    each = -(-quads // THREADS)
    rounds = -(-all_quads // THREADS)
    registers = 4 * each
    receive = make_receive(shape, quads, pairs=True)
    inverse_width, epsilon = np.float32(1.0 / width), np.float32(shape.eps)

    @ptx.large_device_function
    def stage_norm(exchange, start, epoch, weights, norm, thread, words, floats, patience, fault):
        gains = cuda.local.array(registers, float32)
        values = cuda.local.array(registers, float32)
        received = cuda.local.array(registers, uint32)
        for i in range(each):
            quad = i * THREADS + thread
            if quad < quads:
                w0, w1, w2, w3 = ptx.load_16(weights, norm + quad * 4)
                gains[4 * i], gains[4 * i + 1] = ptx.bits_f32(w0), ptx.bits_f32(w1)
                gains[4 * i + 2], gains[4 * i + 3] = ptx.bits_f32(w2), ptx.bits_f32(w3)
        receive(exchange, start, epoch, thread, received, patience, fault)
        squares = _ZERO
        for i in range(each):
            a, b = pair_of(received[4 * i], received[4 * i + 1])
            c, d = pair_of(received[4 * i + 2], received[4 * i + 3])
            values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3] = a, b, c, d
            if i * THREADS + thread < quads:
                squares += (a * a + b * b) + (c * c + d * d)
        squares = ptx.warp_sum(squares)
        if thread & 31 == 0:
            floats[scalars + (thread >> 5)] = squares
        meet()
        squares = _ZERO
        for warp in range(CONSUMERS):
            squares += floats[scalars + warp]
        factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
        for i in range(rounds):
            quad = i * THREADS + thread
            at = x_start + swizzled(2 * quad)
            if i < each and quad < quads:
                a, b = values[4 * i] * factor * gains[4 * i], values[4 * i + 1] * factor * gains[4 * i + 1]
                words[at] = ptx.pack_f16x2(a, b)
                a, b = values[4 * i + 2] * factor * gains[4 * i + 2], values[4 * i + 3] * factor * gains[4 * i + 3]
                words[at + 1] = ptx.pack_f16x2(a, b)
            elif quad < all_quads:
                words[at] = np.uint32(0)
                words[at + 1] = np.uint32(0)
        meet()

    return stage_norm


def make_stage_copy(shape: PersistentShape, width: int, padded: int) -> Any:
    """Device function (exchange, start, epoch, thread, words, patience, fault): x = float16 pairs, as they come."""
    x_start = shape.x_start
    quads, all_quads = width // 4, padded // 4
    each = -(-quads // THREADS)
    rounds = -(-all_quads // THREADS)
    registers = 4 * each
    receive = make_receive(shape, quads, pairs=False)

    @ptx.large_device_function
    def stage_copy(exchange, start, epoch, thread, words, patience, fault):
        received = cuda.local.array(registers, uint32)
        receive(exchange, start, epoch, thread, received, patience, fault)
        for i in range(rounds):
            quad = i * THREADS + thread
            at = x_start + swizzled(2 * quad)
            if i < each and quad < quads:
                words[at], words[at + 1] = received[4 * i], received[4 * i + 2]
            elif quad < all_quads:
                words[at] = np.uint32(0)
                words[at + 1] = np.uint32(0)
        meet()

    return stage_copy
