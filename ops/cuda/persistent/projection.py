"""A projection of the persistent kernel: a block's shares, slot by slot, out of the ring.

Slot q of a round goes to warp q % `CONSUMERS`, whatever its share; its sums, 16 of them, go to shared memory, and when
the round's slots are done a few threads add up each share's in order of the columns: the same bits in every run. Rounds
take turns between two sets of sums, so that one meeting per round is enough.

All projections of a step run through this one piece of code, with their sizes as variables: a copy for each made the
kernel half as long again, took three times as long to compile, and was no faster.
"""

from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.fragments import GROUP_WORDS, HALF_WORDS
from numba_atomflow.ops.cuda.persistent.ring import await_barrier
from numba_atomflow.ops.cuda.persistent.shape import CHUNK, CONSUMERS, THREADS, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import meet
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, WAITED

_ZERO = np.float32(0.0)
TURN, CHUNKS = 0, 1  # places in a warp's state: which set of sums is next; slots' contents that the block has had


def make_multiply(shape: PersistentShape, *, halves: bool) -> Any:
    """Device function (words, floats, slot, x, apart, groups, lane, total): total = a slot's sums for rows g and g + 8.

    Args of it: slot, of the ring; x, the word of shared memory at which the vector's elements for it begin; apart, from
    there to those for rows 8-15: 0, or, where these are the next chunk's rows 0-7, a chunk's; groups, that a chunk has.

    The vector takes all 8 columns of the other factor: even ones for rows 0-7, and odd ones for rows 8-15.

    Two chains of sums for each group of columns, so that the tensor cores need not wait for themselves.
    """
    slot_words = shape.slot_words
    matrices = [matrix for matrix in shape.matrices if matrix.halves == halves]
    even = all(matrix.last_chunk_groups == CHUNK for matrix in matrices)
    x_step = 32 if halves else 64  # words of x per group
    code_registers, scale_registers = 16 * CHUNK, 2 * CHUNK

    @ptx.large_device_function
    def multiply(words, floats, slot, x, apart, groups, lane, total):  # type: ignore[no-untyped-def]
        codes = cuda.local.array(code_registers, uint32)
        scales = cuda.local.array(scale_registers, float32)
        start = np.uint32(slot * np.uint32(slot_words))
        count = np.uint32(CHUNK if even else groups)
        second = np.uint32(start + count * np.uint32(HALF_WORDS))  # of rows 8-15: codes, then scales
        for u in range(CHUNK):
            if even or u < groups:
                for i in range(4):
                    if halves:
                        place = start + u * GROUP_WORDS + i * 128
                    else:
                        place = (second if i % 2 else start) + u * 256 + i // 2 * 128
                    w0, w1, w2, w3 = ptx.load_block_16(words, place + lane * 4)
                    at = 16 * u + 4 * i
                    codes[at], codes[at + 1], codes[at + 2], codes[at + 3] = w0, w1, w2, w3
                if not halves:
                    at = count * np.uint32(256) + u * 8 + (lane >> 2)
                    scales[2 * u], scales[2 * u + 1] = floats[start + at], floats[second + at]
        low, high = _ZERO, _ZERO
        x_row = x + (lane >> 2 & 1) * apart + (lane & 3) * (4 if halves else 8)
        for u in range(CHUNK):
            if even or u < groups:
                c0, c1, c2, c3 = _ZERO, _ZERO, _ZERO, _ZERO
                d0, d1, d2, d3 = _ZERO, _ZERO, _ZERO, _ZERO
                for s in range(2):
                    at = 16 * u + 8 * s
                    if halves:
                        b0, b1, b2, b3 = ptx.load_block_16(words, x_row + u * x_step + s * 16)
                        a0, a1, a2, a3 = codes[at], codes[at + 4], codes[at + 1], codes[at + 5]
                        c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        a0, a1, a2, a3 = codes[at + 2], codes[at + 6], codes[at + 3], codes[at + 7]
                        d0, d1, d2, d3 = ptx.mma(a0, a1, a2, a3, b2, b3, d0, d1, d2, d3)
                    else:
                        for h in range(2):
                            b0, b1, b2, b3 = ptx.load_block_16(words, x_row + u * x_step + s * 32 + h * 4)
                            low_0, low_1 = ptx.decode_fp8_cvt(codes[at + 2 * h])
                            high_0, high_1 = ptx.decode_fp8_cvt(codes[at + 4 + 2 * h])
                            c0, c1, c2, c3 = ptx.mma(low_0, high_0, low_1, high_1, b0, b1, c0, c1, c2, c3)
                            low_0, low_1 = ptx.decode_fp8_cvt(codes[at + 2 * h + 1])
                            high_0, high_1 = ptx.decode_fp8_cvt(codes[at + 5 + 2 * h])
                            d0, d1, d2, d3 = ptx.mma(low_0, high_0, low_1, high_1, b2, b3, d0, d1, d2, d3)
                if halves:
                    low += c0 + d0
                    high += c3 + d3
                else:
                    low += (c0 + d0) * scales[2 * u]
                    high += (c3 + d3) * scales[2 * u + 1]
        total[0], total[1] = low, high

    return multiply


def make_project(shape: PersistentShape, prepare: Any, finish: Any) -> Any:
    """Device function (kind, first, thread, words, floats, barriers, state, patience, fault, given, times, op): all but
    the staging of x.

    Args of it: kind, which projection; first, the block's first share; given: handed on to `prepare` and `finish`.

    Args:
        prepare: device function (kind, given, share, entry, ahead): start the loads that `finish` needs for this entry,
            into four words `ahead`; called before the weights are waited for.
        finish: device function (kind, given, share, entry, ahead, floats, sums): what becomes of a share, entry by
            entry; the sums of row r of its n-th slot stand at floats[sums + 16 * n + r], where in half tiles rows
            8-15 are rows 0-7 over the next chunk.
    """
    slots, blocks = shape.slots, shape.multiprocessors
    partials, partial_words = shape.partials_start, shape.partial_words
    landed, free = shape.barriers_start, shape.barriers_start + slots
    trace, ops = shape.trace, shape.ops
    halves = shape.vocabulary.halves
    multiply = make_multiply(shape, halves=False)
    multiply_halves = make_multiply(shape, halves=True) if halves else multiply
    shares_of, slots_of, halved_of = shape.picker("shares"), shape.picker("slots"), shape.picker("halved")
    last_groups_of, x_start = shape.picker("last_chunk_groups"), shape.x_start
    round_shares_of, entry_bits_of = shape.picker("round_shares"), shape.picker("entry_bits")
    x_words = np.uint32(CHUNK * 64)  # of a chunk

    @ptx.device_function
    def split_entry(entry, bits):  # type: ignore[no-untyped-def]
        """Share of the round, and part of it."""
        share = np.uint32(entry >> bits)
        return share, np.uint32(entry - (share << bits))

    @ptx.large_device_function
    def project(kind, first, thread, words, floats, barriers, state, patience, fault, given, times, op):  # type: ignore[no-untyped-def]
        ahead = cuda.local.array(4, uint32)
        total = cuda.local.array(2, float32)
        # 32 bits without sign: no index has to be looked at for being negative.
        me, blocks_now = np.uint32(thread), np.uint32(blocks)
        lane, warp = np.uint32(me & np.uint32(31)), np.uint32(me >> np.uint32(5))
        pieces, round_shares = np.uint32(slots_of(kind)), np.uint32(round_shares_of(kind))
        halved = np.uint32(halved_of(kind))
        apart = np.uint32(halved * x_words)
        bits = np.uint32(entry_bits_of(kind))
        last_groups = last_groups_of(kind)
        start = np.uint32(first)
        own = np.uint32((np.uint32(shares_of(kind)) - start + blocks_now - np.uint32(1)) // blocks_now)
        while own > np.uint32(0):
            now = min(round_shares, own)
            sums = np.uint32(np.uint32(partials) + state[TURN] * np.uint32(partial_words))
            # By all threads, as a branch would wait for what is loaded in it.
            entries = np.uint32(now << bits)
            entry = min(me, np.uint32(entries - np.uint32(1)))
            share, part = split_entry(entry, bits)
            prepare(kind, given, np.uint32(start + share * blocks_now), part, ahead)
            q, piece = warp, warp
            while piece >= pieces:
                piece = np.uint32(piece - pieces)
            while q < np.uint32(now * pieces):
                n = np.uint32(state[CHUNKS] + q)
                turn = np.uint32(n // np.uint32(slots))
                slot = np.uint32(n - turn * np.uint32(slots))
                began = ptx.cycles() if trace else np.uint64(0)
                await_barrier(barriers, landed + slot, turn & np.uint32(1), patience, fault)
                if trace and thread == 0:
                    times[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + WAITED] += int64(ptx.cycles() - began)
                groups = last_groups if piece == np.uint32(pieces - np.uint32(1)) else np.int32(CHUNK)
                if halves and kind == VOCABULARY:
                    x = np.uint32(np.uint32(x_start) + (piece * x_words >> np.uint32(1)))
                    multiply_halves(words, floats, slot, x, apart, groups, lane, total)
                else:
                    x = np.uint32(np.uint32(x_start) + (piece * x_words << halved))
                    multiply(words, floats, slot, x, apart, groups, lane, total)
                ptx.sync_warp()
                if lane == np.uint32(0):
                    ptx.barrier_arrive(barriers, free + slot)
                if lane & np.uint32(3) == np.uint32(0):
                    at = np.uint32(sums + q * np.uint32(16) + (lane >> np.uint32(2)))
                    floats[at] = total[0]
                    floats[np.uint32(at + np.uint32(8))] = total[1]
                q = np.uint32(q + np.uint32(CONSUMERS))
                piece = np.uint32(piece + np.uint32(CONSUMERS))
                while piece >= pieces:
                    piece = np.uint32(piece - pieces)
            state[CHUNKS] = np.uint32(state[CHUNKS] + now * pieces)
            meet()
            entry = me
            while entry < entries:
                number, part = split_entry(entry, bits)
                share = np.uint32(start + number * blocks_now)
                if entry != me:
                    prepare(kind, given, share, part, ahead)
                finish(kind, given, share, part, ahead, floats, np.uint32(sums + number * pieces * np.uint32(16)))
                entry = np.uint32(entry + np.uint32(THREADS))
            state[TURN] = np.uint32(state[TURN] ^ np.uint32(1))
            start = np.uint32(start + now * blocks_now)
            own = np.uint32(own - now)

    return project


def make_row_sum(shape: PersistentShape, kind: int) -> Any:
    """Device function (floats, sums, row) -> a row's sum over all chunks of its tile, in their order."""
    slots, halved = shape.sizes("slots")[kind], shape.sizes("halved")[kind]

    @ptx.device_function
    def row_sum(floats, sums, row):  # type: ignore[no-untyped-def]
        total = _ZERO
        for slot in range(slots):
            total += floats[sums + slot * 16 + row]
            if halved:
                total += floats[sums + slot * 16 + row + 8]
        return total

    return row_sum
