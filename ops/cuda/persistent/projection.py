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
from numba_atomflow.ops.cuda.layout.weights import GROUP_WORDS, HALF_GROUP_WORDS
from numba_atomflow.ops.cuda.persistent.pipeline import await_barrier
from numba_atomflow.ops.cuda.persistent.schedule import CHUNK, CONSUMERS, THREADS, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import meet, swizzled
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, WAITED

_ZERO = np.float32(0.0)
TURN, CHUNKS = 0, 1  # places in a warp's state: which set of sums is next; slots' contents that the block has had


def make_multiply(shape: PersistentShape, *, halves: bool) -> Any:
    """Device function (words, floats, slot, x, apart, groups, lane) -> a slot's sums: lane 4 g has that of row g, lane
    4 g + 2 that of row g + 8.

    Args of it: slot, of the ring; x, the word of shared memory at which the vector's elements for it begin; apart, from
    there to those for rows 8-15: 0, or, where these are the next chunk's rows 0-7, a chunk's; groups, that a chunk has.

    A block's warps can have 128 bytes a cycle brought into registers, no more, and were the vector all 8 columns of the
    other factor, it would take as many as the weights. So each group of 128 columns has a column of its own, 0-3 for
    rows 0-7 and 4-7 for rows 8-15: one fragment of the vector serves four groups, which are multiplied by all columns,
    and each of which is then taken from its own.
    """
    slot_words = shape.slot_words
    matrices = [matrix for matrix in shape.matrices if (matrix.format.bits == 16) == halves]
    even = all(matrix.last_k_tile_groups == CHUNK for matrix in matrices)
    x_step = 32 if halves else 64  # words of x per group
    code_registers, sum_registers = 16 * CHUNK, 4 * CHUNK
    fragments = 2 if halves else 4  # of 16 bytes, of x

    @ptx.large_device_function
    def multiply(words, floats, slot, x, apart, groups, lane):
        codes = cuda.local.array(code_registers, uint32)
        sums = cuda.local.array(sum_registers, float32)
        g, t = np.uint32(lane >> np.uint32(2)), np.uint32(lane & np.uint32(3))
        odd, upper = t & np.uint32(1) == np.uint32(1), t >= np.uint32(2)
        start = np.uint32(slot * np.uint32(slot_words))
        count = np.uint32(CHUNK if even else groups)
        second = np.uint32(start + count * np.uint32(HALF_GROUP_WORDS))  # of rows 8-15: codes, then scales
        for u in range(CHUNK):
            if even or u < groups:
                for i in range(4):
                    if halves:
                        place = start + u * GROUP_WORDS + i * 128
                    else:
                        place = (second if i % 2 else start) + u * 256 + i // 2 * 128
                    w0, w1, w2, w3 = ptx.load_shared_16(words, place + lane * 4)
                    at = 16 * u + 4 * i
                    codes[at], codes[at + 1], codes[at + 2], codes[at + 3] = w0, w1, w2, w3
        for i in range(sum_registers):
            sums[i] = _ZERO
        column = np.uint32((g >> np.uint32(2)) * apart + (g & np.uint32(3)) * np.uint32(x_step))
        for i in range(fragments):
            unit = np.uint32(4 * i + t) if halves else np.uint32(i // 2 * 8 + i % 2 + 2 * t)
            b0, b1, b2, b3 = ptx.load_shared_16(words, np.uint32(x + swizzled(np.uint32(column + unit * np.uint32(4)))))
            for k in range(2):
                for u in range(CHUNK):
                    if even or u < groups:
                        if halves:
                            at = 16 * u + 8 * i + 2 * k
                            a0, a1, a2, a3 = codes[at], codes[at + 4], codes[at + 1], codes[at + 5]
                        else:
                            at = 16 * u + i // 2 * 8 + i % 2 * 2 + k
                            a0, a2 = ptx.convert_fp8_cvt(codes[at])
                            a1, a3 = ptx.convert_fp8_cvt(codes[at + 4])
                        c0, c1, c2, c3 = sums[4 * u], sums[4 * u + 1], sums[4 * u + 2], sums[4 * u + 3]
                        if k == 0:
                            c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        else:
                            c0, c1, c2, c3 = ptx.mma(a0, a1, a2, a3, b2, b3, c0, c1, c2, c3)
                        sums[4 * u], sums[4 * u + 1], sums[4 * u + 2], sums[4 * u + 3] = c0, c1, c2, c3
        # Columns 2 t and 2 t + 1 are a lane's: those of two of the groups, for its row above or below.
        above, below = (sums[8], sums[10]) if odd else (sums[0], sums[2])
        first = below if upper else above
        above, below = (sums[13], sums[15]) if odd else (sums[5], sums[7])
        other = below if upper else above
        if not halves:
            group = np.uint32((t & np.uint32(1)) * np.uint32(2))
            scale = np.uint32((second if upper else start) + count * np.uint32(256) + group * np.uint32(8) + g)
            if even or group < count:
                first *= floats[scale]
            if even or np.uint32(group + np.uint32(1)) < count:
                other *= floats[np.uint32(scale + np.uint32(8))]
        total = first + other
        return total + ptx.shuffle_xor_f32(total, 1)

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
    slots, blocks = shape.slots, shape.sms
    partials, partial_words = shape.partials_start, shape.partial_words
    landed, free = shape.barriers_start, shape.barriers_start + slots
    trace, ops = shape.trace, shape.ops
    halves = shape.vocabulary.format.bits == 16
    multiply = make_multiply(shape, halves=False)
    multiply_halves = make_multiply(shape, halves=True) if halves else multiply
    shares_of, slots_of, halved_of = shape.picker("shares"), shape.picker("slots"), shape.picker("halved")
    last_groups_of, x_start = shape.picker("last_k_tile_groups"), shape.x_start
    round_shares_of, entry_bits_of = shape.picker("round_shares"), shape.picker("entry_bits")
    x_words = np.uint32(CHUNK * 64)  # of a chunk

    @ptx.device_function
    def split_entry(entry, bits):
        """Share of the round, and part of it."""
        share = np.uint32(entry >> bits)
        return share, np.uint32(entry - (share << bits))

    @ptx.large_device_function
    def project(kind, first, thread, words, floats, barriers, state, patience, fault, given, times, op):
        ahead = cuda.local.array(4, uint32)
        # 32 bits without sign: no index has to be looked at for being negative.
        me, blocks_now = np.uint32(thread), np.uint32(blocks)
        lane, warp = np.uint32(me & np.uint32(31)), np.uint32(me >> np.uint32(5))
        first_landed, first_free = ptx.shared_address(barriers, landed), ptx.shared_address(barriers, free)
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
                await_barrier(barriers, first_landed + slot * np.uint32(8), turn & np.uint32(1), patience, fault)
                if trace and thread == 0:
                    times[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + WAITED] += int64(ptx.cycles() - began)
                groups = last_groups if piece == np.uint32(pieces - np.uint32(1)) else np.int32(CHUNK)
                if halves and kind == VOCABULARY:
                    x = np.uint32(np.uint32(x_start) + (piece * x_words >> np.uint32(1)))
                    total = multiply_halves(words, floats, slot, x, apart, groups, lane)
                else:
                    x = np.uint32(np.uint32(x_start) + (piece * x_words << halved))
                    total = multiply(words, floats, slot, x, apart, groups, lane)
                ptx.sync_warp()
                if lane == np.uint32(0):
                    ptx.barrier_arrive(barriers, first_free + slot * np.uint32(8))
                if lane & np.uint32(1) == np.uint32(0):
                    row = (lane >> np.uint32(2)) + (lane & np.uint32(2)) * np.uint32(4)
                    floats[np.uint32(sums + q * np.uint32(16) + row)] = total
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
    def row_sum(floats, sums, row):
        total = _ZERO
        for slot in range(slots):
            total += floats[sums + slot * 16 + row]
            if halved:
                total += floats[sums + slot * 16 + row + 8]
        return total

    return row_sum
