"""The ring of chunks in shared memory: one warp has weights copied into it, the others take them out.

The producer knows the whole step in advance: which tiles its block has in which projection. It never waits for an op to
end, only for a free slot, and so the copies of the next op's weights are on their way, or have landed, while the blocks
still exchange the results of this one. At most `in_flight` copies are on their way at a time: the memory system is busy
with that many, and small accesses (the exchange, the cache) need not queue behind more.

Slot n % slots holds chunk n of the block. Two barriers per slot: `landed` completes when the chunk's bytes are there,
`free` when the warp that took them has them in registers. Chunk n waits for the phase of parity (n // slots) & 1 of
`landed`.
"""

from typing import Any

import numpy as np
from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.exchange import give_up
from numba_atomflow.ops.cuda.persistent.shape import ATTENTION, TABLE_UNIT, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.persistent.trace import COPY_BEGUN, COPY_DONE, make_note


@ptx.device_function
def await_barrier(barriers, index, parity, patience, fault):  # type: ignore[no-untyped-def]
    """Wait for a phase of an mbarrier; not for ever."""
    tries = np.uint32(0)
    while ptx.barrier_ready(barriers, index, parity) == 0:
        tries = np.uint32(tries + np.uint32(1))
        if give_up(patience, fault, tries):
            break


def make_deal(blocks: int) -> Any:
    """Device function (offset) -> the block's first tile of a projection, when `offset` tiles were dealt before."""

    @ptx.device_function
    def deal(offset):  # type: ignore[no-untyped-def]
        return (np.int32(cuda.blockIdx.x) + np.int32(blocks) - offset) % np.int32(blocks)

    return deal


def make_kind_of(shape: PersistentShape) -> Any:
    """Device function (op) -> its kind; op from 1 on."""
    ops = shape.ops

    @ptx.device_function
    def kind_of(op):  # type: ignore[no-untyped-def]
        return np.int32(VOCABULARY) if op == ops - 1 else np.int32((np.int32(op) - np.int32(1)) % np.int32(5))

    return kind_of


def make_produce(shape: PersistentShape) -> Any:
    """Device function (weights, words, barriers, first, last, patience, fault, times): the producer's whole life; one
    thread.

    Args of it: weights uint32, all of the model's; words uint32 and barriers uint64, views of shared
    memory; ops first .. last - 1 are run.
    """
    slots, slot_words, in_flight = shape.slots, shape.slot_words, shape.in_flight
    landed, free = shape.barriers_start, shape.barriers_start + slots
    table_start, blocks = shape.table_start, shape.multiprocessors
    ahead, pace = shape.ahead, shape.pace
    deal = make_deal(blocks)

    @ptx.device_function
    def following(slot, turn):  # type: ignore[no-untyped-def]
        """The next slot, and the parity that goes with it."""
        slot = np.uint32(slot + np.uint32(1))
        if slot == np.uint32(slots):
            return np.uint32(0), np.uint32(turn ^ np.uint32(1))
        return slot, turn

    tiles_of, chunks_of = shape.picker("tiles"), shape.picker("chunks")
    tile_words_of, chunk_words_of = shape.picker("tile_words"), shape.picker("chunk_words")
    last_words_of, ops = shape.picker("last_chunk_words"), shape.ops
    kind_of, note = make_kind_of(shape), make_note(shape)

    @ptx.large_device_function
    def produce(weights, words, barriers, first, last, patience, fault, times):  # type: ignore[no-untyped-def]
        offset = np.int32(0)
        n, slot, old_slot = np.uint32(0), np.uint32(0), np.uint32(0)  # chunks so far; their slots
        # Parities: of the slot's last release, of the oldest copy under way.
        turn, old_turn = np.uint32(1), np.uint32(0)
        asked = ptx.cycles()
        for op in range(1, ops):
            kind = kind_of(op)
            if kind == ATTENTION:
                continue
            tiles, chunks = tiles_of(kind), np.int32(chunks_of(kind))
            chunk_words, tile_words = np.int64(chunk_words_of(kind)), np.int64(tile_words_of(kind))
            chunk_bytes, last_bytes = np.uint32(4 * chunk_words), np.uint32(4 * last_words_of(kind))
            start = np.int64(words[table_start + 2 * op]) * TABLE_UNIT
            tile = deal(offset) if first <= op < last else tiles
            if tile < tiles:
                note(times, op, COPY_BEGUN)
            far, far_tile, far_chunk, far_source = n, tile, np.int32(0), start + np.int64(tile) * tile_words
            while tile < tiles:
                source = start + np.int64(tile) * tile_words
                for chunk in range(chunks):
                    if n >= np.uint32(slots):
                        full = ptx.barrier_passed(barriers, free + slot, turn) == 0
                        if full and far < n:
                            far, far_tile, far_chunk, far_source = n, tile, np.int32(chunk), source
                        while full and far < n + np.uint32(ahead) and far_tile < tiles:
                            if ptx.cycles() - asked >= np.uint64(pace):
                                asked = ptx.cycles()
                                far = np.uint32(far + np.uint32(1))
                                far_chunk = np.int32(far_chunk + np.int32(1))
                                ends = far_chunk == chunks
                                ptx.prefetch_bulk(weights, far_source, last_bytes if ends else chunk_bytes)
                                far_source += chunk_words
                                if ends:
                                    far_chunk, far_tile = np.int32(0), np.int32(far_tile + np.int32(blocks))
                                    far_source = start + np.int64(far_tile) * tile_words
                            full = ptx.barrier_passed(barriers, free + slot, turn) == 0
                        if full:
                            await_barrier(barriers, free + slot, turn, patience, fault)
                    if n >= np.uint32(in_flight):
                        await_barrier(barriers, landed + old_slot, old_turn, patience, fault)
                        old_slot, old_turn = following(old_slot, old_turn)
                    nbytes = last_bytes if chunk == chunks - 1 else chunk_bytes
                    ptx.barrier_expect(barriers, landed + slot, nbytes)
                    at = slot * np.uint32(slot_words)
                    ptx.bulk_copy(words, at, weights, source, nbytes, barriers, landed + slot)
                    source += chunk_words
                    slot, turn = following(slot, turn)
                    n = np.uint32(n + np.uint32(1))
                tile = np.int32(tile + np.int32(blocks))
                note(times, op, COPY_DONE)
            offset = (offset + tiles) % np.int32(blocks)
        # A block must not end while copies into its shared memory are on their way.
        for _ in range(in_flight):
            if old_slot != slot:
                await_barrier(barriers, landed + old_slot, old_turn, patience, fault)
                old_slot, old_turn = following(old_slot, old_turn)

    return produce
