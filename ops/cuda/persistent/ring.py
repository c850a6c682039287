"""The ring of chunks in shared memory: one warp has weights copied into it, the others take them out.

The producer knows the whole step in advance: which tiles its block has in which projection. It never waits for an op to
end, only for a free slot, and so the copies of the next op's weights are on their way, or have landed, while the blocks
still exchange the results of this one. At most `in_flight` copies are on their way at a time: the memory system is busy with
that many, and small accesses (the exchange, the cache) need not queue behind more.

Slot n % slots holds chunk n of the block. Two barriers per slot: `landed` completes when the chunk's bytes are there, `free`
when the warp that took them has them in registers. Chunk n waits for the phase of parity (n // slots) & 1 of `landed`.
"""

from typing import Any

import numpy as np
from numba import cuda

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.fragments import FragmentLayout
from numba_atomflow.ops.cuda.persistent.exchange import give_up
from numba_atomflow.ops.cuda.persistent.shape import TABLE_UNIT, PersistentShape


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


def make_produce(shape: PersistentShape) -> Any:
    """Device function (weights, slots, barriers, table, first, last, fault): the producer's whole life; one thread.

    Args of it: weights uint32, all of the model's; slots and table uint32, barriers uint64, all views of shared memory;
    ops first .. last - 1 are run.
    """
    slots, slot_words, in_flight = shape.slots, shape.slot_words, shape.in_flight
    landed, free = shape.barriers_start, shape.barriers_start + slots
    table_start, layers, blocks = shape.table_start, shape.layers, shape.multiprocessors
    deal = make_deal(blocks)

    def make_stream(layout: FragmentLayout) -> Any:
        tiles, chunks, tile_words = layout.tiles, layout.chunks, layout.tile_words
        chunk_words = layout.chunk_words
        chunk_bytes, last_bytes = 4 * chunk_words, 4 * layout.last_chunk_words

        @ptx.large_device_function
        def stream(weights, words, barriers, op, offset, active, state, patience, fault):  # type: ignore[no-untyped-def]
            """Copy the block's chunks of one projection. state: chunks so far."""
            tile = deal(offset)
            start = np.int64(words[table_start + 2 * op]) * TABLE_UNIT
            while tile < tiles and active:
                for chunk in range(chunks):
                    n = state[0]
                    slot = n % np.uint32(slots)
                    turn = n // np.uint32(slots)
                    if n >= np.uint32(slots):
                        await_barrier(barriers, free + slot, (turn - np.uint32(1)) & np.uint32(1), patience, fault)
                    if n >= np.uint32(in_flight):
                        old = np.uint32(n - np.uint32(in_flight))
                        old_slot, old_turn = old % np.uint32(slots), old // np.uint32(slots)
                        await_barrier(barriers, landed + old_slot, old_turn & np.uint32(1), patience, fault)
                    nbytes = np.uint32(last_bytes if chunk == chunks - 1 else chunk_bytes)
                    ptx.barrier_expect(barriers, landed + slot, nbytes)
                    ptx.bulk_copy(
                        words,
                        slot * np.uint32(slot_words),
                        weights,
                        start + np.int64(tile) * tile_words + chunk * chunk_words,
                        nbytes,
                        barriers,
                        landed + slot,
                    )
                    state[0] = np.uint32(n + np.uint32(1))
                tile += np.int32(blocks)
            return (offset + np.int32(tiles % blocks)) % np.int32(blocks)

        return stream

    stream_qkv, stream_o = make_stream(shape.qkv), make_stream(shape.o)
    stream_gate_up, stream_down = make_stream(shape.gate_up), make_stream(shape.down)
    stream_vocabulary = make_stream(shape.vocabulary)

    @ptx.large_device_function
    def produce(weights, words, barriers, first, last, state, patience, fault):  # type: ignore[no-untyped-def]
        offset = np.int32(0)
        for layer in range(layers):
            op = 1 + 5 * layer
            active = first <= op < last
            offset = stream_qkv(weights, words, barriers, op, offset, active, state, patience, fault)
            active = first <= op + 2 < last
            offset = stream_o(weights, words, barriers, op + 2, offset, active, state, patience, fault)
            active = first <= op + 3 < last
            offset = stream_gate_up(weights, words, barriers, op + 3, offset, active, state, patience, fault)
            active = first <= op + 4 < last
            offset = stream_down(weights, words, barriers, op + 4, offset, active, state, patience, fault)
        op = 1 + 5 * layers
        stream_vocabulary(weights, words, barriers, op, offset, first <= op < last, state, patience, fault)
        # A block must not end while copies into its shared memory are on their way.
        for back in range(in_flight):
            n = state[0]
            if n > np.uint32(back):
                old = np.uint32(n - np.uint32(1) - np.uint32(back))
                old_slot, old_turn = old % np.uint32(slots), old // np.uint32(slots)
                await_barrier(barriers, landed + old_slot, old_turn & np.uint32(1), patience, fault)

    return produce
