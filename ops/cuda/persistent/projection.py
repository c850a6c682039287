"""A projection of the persistent kernel: a block's tiles, chunk by chunk, out of the ring.

Chunk q of a round goes to warp q % `CONSUMERS`, whatever its tile; a chunk's sums over its own columns, 16 rows, go to
shared memory, and when the round's chunks are done a few threads add up each tile's in order of the columns: the same
bits in every run. Rounds take turns between two sets of sums, so that one meeting per round is enough.

All projections of a step run through this one piece of code, with their sizes as variables: a copy for each made the
kernel half as long again, took three times as long to compile, and was no faster.
"""

from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.fragments import GROUP_WORDS
from numba_atomflow.ops.cuda.persistent.ring import await_barrier
from numba_atomflow.ops.cuda.persistent.shape import CHUNK, CONSUMERS, THREADS, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import meet
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, WAITED

_ZERO = np.float32(0.0)
TURN, CHUNKS = 0, 1  # places in a warp's state: which set of sums is next; chunks that the block has had


def make_multiply(shape: PersistentShape, *, halves: bool) -> Any:
    """Device function (words, floats, slot, chunk, groups, lane, total): total = a chunk's sums for rows g and g + 8.

    Args of it: slot, of the ring; chunk, of its tile; groups, that it has.

    Two chains of sums for each group of columns, so that the tensor cores need not wait for themselves.
    """
    slot_words, x_start = shape.slot_words, shape.x_start
    matrices = [matrix for matrix in shape.matrices if matrix.halves == halves]
    even = all(matrix.last_chunk_groups == CHUNK for matrix in matrices)
    x_step = 32 if halves else 64  # words of x per group
    code_registers, scale_registers = 16 * CHUNK, 2 * CHUNK

    @ptx.large_device_function
    def multiply(words, floats, slot, chunk, groups, lane, total):  # type: ignore[no-untyped-def]
        codes = cuda.local.array(code_registers, uint32)
        scales = cuda.local.array(scale_registers, float32)
        start = np.uint32(slot * np.uint32(slot_words))
        for u in range(CHUNK):
            if even or u < groups:
                for i in range(4):
                    w0, w1, w2, w3 = ptx.load_block_16(words, start + u * GROUP_WORDS + i * 128 + lane * 4)
                    at = 16 * u + 4 * i
                    codes[at], codes[at + 1], codes[at + 2], codes[at + 3] = w0, w1, w2, w3
                if not halves:
                    at = start + (CHUNK if even else groups) * GROUP_WORDS + u * 16 + (lane >> 2) * 2
                    scales[2 * u], scales[2 * u + 1] = floats[at], floats[at + 1]
        low, high = _ZERO, _ZERO
        x_row = x_start + chunk * (CHUNK * x_step) + (lane & 3) * (4 if halves else 8)
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
                    high += c2 + d2
                else:
                    low += (c0 + d0) * scales[2 * u]
                    high += (c2 + d2) * scales[2 * u + 1]
        total[0], total[1] = low, high

    return multiply


def make_project(shape: PersistentShape, prepare: Any, finish: Any) -> Any:
    """Device function (kind, first, thread, words, floats, barriers, state, patience, fault, given, times, op): all but
    the staging of x.

    Args of it: kind, which projection; first, the block's first tile; given: handed on to `prepare` and `finish`.

    Args:
        prepare: device function (kind, given, tile, entry, ahead): start the loads that `finish` needs for this entry,
            into four words `ahead`; called before the weights are waited for.
        finish: device function (kind, given, tile, entry, ahead, floats, sums): what becomes of a tile, entry by entry;
            the sums of row r stand at floats[sums + 16 * chunk + r].
    """
    slots, blocks = shape.slots, shape.multiprocessors
    partials, partial_words = shape.partials_start, shape.partial_words
    landed, free = shape.barriers_start, shape.barriers_start + slots
    trace, ops = shape.trace, shape.ops
    halves = shape.vocabulary.halves
    multiply = make_multiply(shape, halves=False)
    multiply_halves = make_multiply(shape, halves=True) if halves else multiply
    tiles_of, chunks_of = shape.picker("tiles"), shape.picker("chunks")
    last_groups_of = shape.picker("last_chunk_groups")
    round_tiles_of, entry_bits_of = shape.picker("round_tiles"), shape.picker("entry_bits")

    @ptx.device_function
    def split_entry(entry, bits):  # type: ignore[no-untyped-def]
        """Tile of the round, and part of it."""
        tile = np.uint32(entry >> bits)
        return tile, np.uint32(entry - (tile << bits))

    @ptx.large_device_function
    def project(kind, first, thread, words, floats, barriers, state, patience, fault, given, times, op):  # type: ignore[no-untyped-def]
        ahead = cuda.local.array(4, uint32)
        total = cuda.local.array(2, float32)
        # 32 bits without sign: no index has to be looked at for being negative.
        me, blocks_now = np.uint32(thread), np.uint32(blocks)
        lane, warp = np.uint32(me & np.uint32(31)), np.uint32(me >> np.uint32(5))
        chunks, round_tiles = np.uint32(chunks_of(kind)), np.uint32(round_tiles_of(kind))
        bits = np.uint32(entry_bits_of(kind))
        last_groups = last_groups_of(kind)
        start = np.uint32(first)
        own = np.uint32((np.uint32(tiles_of(kind)) - start + blocks_now - np.uint32(1)) // blocks_now)
        while own > np.uint32(0):
            now = min(round_tiles, own)
            sums = np.uint32(np.uint32(partials) + state[TURN] * np.uint32(partial_words))
            # By all threads, as a branch would wait for what is loaded in it.
            entries = np.uint32(now << bits)
            entry = min(me, np.uint32(entries - np.uint32(1)))
            tile, part = split_entry(entry, bits)
            prepare(kind, given, np.uint32(start + tile * blocks_now), part, ahead)
            q, chunk = warp, warp
            while chunk >= chunks:
                chunk = np.uint32(chunk - chunks)
            while q < np.uint32(now * chunks):
                n = np.uint32(state[CHUNKS] + q)
                turn = np.uint32(n // np.uint32(slots))
                slot = np.uint32(n - turn * np.uint32(slots))
                began = ptx.cycles() if trace else np.uint64(0)
                await_barrier(barriers, landed + slot, turn & np.uint32(1), patience, fault)
                if trace and thread == 0:
                    times[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + WAITED] += int64(ptx.cycles() - began)
                groups = last_groups if chunk == np.uint32(chunks - np.uint32(1)) else np.int32(CHUNK)
                if halves and kind == VOCABULARY:
                    multiply_halves(words, floats, slot, chunk, groups, lane, total)
                else:
                    multiply(words, floats, slot, chunk, groups, lane, total)
                ptx.sync_warp()
                if lane == np.uint32(0):
                    ptx.barrier_arrive(barriers, free + slot)
                if lane & np.uint32(3) == np.uint32(0):
                    at = np.uint32(sums + q * np.uint32(16) + (lane >> np.uint32(2)))
                    floats[at] = total[0]
                    floats[np.uint32(at + np.uint32(8))] = total[1]
                q = np.uint32(q + np.uint32(CONSUMERS))
                chunk = np.uint32(chunk + np.uint32(CONSUMERS))
                while chunk >= chunks:
                    chunk = np.uint32(chunk - chunks)
            state[CHUNKS] = np.uint32(state[CHUNKS] + now * chunks)
            meet()
            entry = me
            while entry < entries:
                tile, part = split_entry(entry, bits)
                row_tile = np.uint32(start + tile * blocks_now)
                if entry != me:
                    prepare(kind, given, row_tile, part, ahead)
                finish(kind, given, row_tile, part, ahead, floats, np.uint32(sums + tile * chunks * np.uint32(16)))
                entry = np.uint32(entry + np.uint32(THREADS))
            state[TURN] = np.uint32(state[TURN] ^ np.uint32(1))
            start = np.uint32(start + now * blocks_now)
            own = np.uint32(own - now)

    return project


def make_row_sum(chunks: int) -> Any:
    """Device function (floats, sums, row) -> a row's sum over all chunks of its tile."""

    @ptx.device_function
    def row_sum(floats, sums, row):  # type: ignore[no-untyped-def]
        total = _ZERO
        for chunk in range(chunks):
            total += floats[sums + chunk * 16 + row]
        return total

    return row_sum
