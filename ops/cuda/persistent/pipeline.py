"""The ring of chunks in shared memory: one warp has weights copied into it, the others take them out.

The producer knows the whole step in advance: which shares its block has of which projection. It never waits for an op
to end, only for a free slot, and so the copies of the next op's weights are on their way, or have landed, while the
blocks still exchange the results of this one. At most `in_flight` copies are on their way at a time: the memory system
is busy with that many, and small accesses (the exchange, the cache) need not queue behind more.

While the ring is full, memory would have nothing to do: the producer then asks for the op's chunks that come next to be
brought into the second-level cache, out of which they are copied faster later. It does so at memory's own pace.

Slot n % slots holds chunk n of the block, or of a half tile the same half of two chunks, which count as one here. Two
barriers per slot: `landed` completes when the chunk's bytes are there, `free` when the warp that took them has them in
registers. Chunk n waits for the phase of parity (n // slots) & 1 of `landed`.
"""

from typing import Any

import numpy as np
from numba import cuda, int32, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import give_up
from numba_atomflow.ops.cuda.persistent.schedule import ATTENTION, TABLE_UNIT, VOCABULARY, PersistentShape
from numba_atomflow.ops.cuda.persistent.trace import COPY_BEGUN, COPY_DONE, make_note

LEAD, SHARE, PIECE, ASKED = range(4)  # of what is asked for ahead


@ptx.device_function
def await_barrier(barriers, address, parity, patience, fault):
    """Wait for a phase of an mbarrier; not for ever."""
    tries = np.uint32(0)
    while ptx.barrier_try_wait(barriers, address, parity) == 0:
        tries = np.uint32(tries + np.uint32(1))
        if give_up(patience, fault, tries):
            break


def make_deal(blocks: int) -> Any:
    """Device function (offset) -> the block's first share of a projection, when `offset` were dealt before."""

    @ptx.device_function
    def deal(offset):
        return (np.int32(cuda.blockIdx.x) + np.int32(blocks) - offset) % np.int32(blocks)

    return deal


def make_kind_of(shape: PersistentShape) -> Any:
    """Device function (op) -> its kind; op from 1 on."""
    ops = shape.ops

    @ptx.device_function
    def kind_of(op):
        return np.int32(VOCABULARY) if op == ops - 1 else np.int32((np.int32(op) - np.int32(1)) % np.int32(5))

    return kind_of


def make_cut(shape: PersistentShape) -> tuple[Any, Any]:
    """Device functions that tell where a projection's weights are, and in which pieces they are copied.

    Returns:
        cut (words, op, kind) -> of: where they begin; words of a tile and of a chunk; slots that a share takes; 1 if
            shares are half tiles, else 0; bytes of a copy, and of the share's last one. A half tile's slot takes two
            copies: the same half of two chunks.
        place (of, share) -> the word of the model's weights at which a share begins.
    """
    table_start, slots_of, halved_of = shape.table_start, shape.picker("slots"), shape.picker("halved")
    tile_words_of, chunk_words_of = shape.picker("tile_words"), shape.picker("k_tile_words")
    last_words_of = shape.picker("last_k_tile_words")

    @ptx.device_function
    def cut(words, op, kind):
        start = np.int64(words[table_start + 2 * op]) * TABLE_UNIT
        halved, chunk_words = np.int32(halved_of(kind)), np.int64(chunk_words_of(kind))
        nbytes = np.uint32(4 * chunk_words >> np.int64(halved))
        last_bytes = nbytes if halved else np.uint32(4 * last_words_of(kind))
        return start, np.int64(tile_words_of(kind)), chunk_words, np.int32(slots_of(kind)), halved, nbytes, last_bytes

    @ptx.device_function
    def place(of, share):
        start, tile_words, chunk_words, halved = of[0], of[1], of[2], of[4]
        return start + np.int64(share >> halved) * tile_words + np.int64(share & halved) * (chunk_words // 2)

    return cut, place


def make_await_free(shape: PersistentShape, place: Any) -> Any:
    """Device function (weights, barriers, address, parity, share, piece, source, of, shares, ahead, far, far_source,
    patience, fault): wait until a slot is free, and use the time.

    Args of it: share, piece and source: what comes into the slot; of, from `cut`; shares, of the projection; ahead,
    chunks from this one on that may be asked for; far int32 [4] and far_source int64 [1]: how many have been (`LEAD`),
    share, piece and place of the one that is asked for next, and when the last one was.
    """
    pace, blocks = np.int32(shape.pace), np.int32(shape.sms)

    @ptx.large_device_function
    def await_free(
        weights, barriers, address, parity, share, piece, source, of, shares, ahead, far, far_source, patience, fault
    ):
        chunk_words, pieces, halved, nbytes, last_bytes = of[2], of[3], of[4], of[5], of[6]
        if far[LEAD] <= 0:
            far[LEAD], far[SHARE], far[PIECE], far_source[0] = 0, share, piece, source
        full = True
        while full and far[LEAD] < ahead and far[SHARE] < shares:
            now = np.int32(ptx.cycles_32())
            if np.int32(now - far[ASKED]) >= pace:
                far[ASKED] = now
                far[LEAD] += 1
                far[PIECE] += 1
                ends = far[PIECE] == pieces
                ptx.bulk_prefetch_l2(weights, far_source[0], last_bytes if ends else nbytes)
                if halved:
                    ptx.bulk_prefetch_l2(weights, far_source[0] + chunk_words, nbytes)
                far_source[0] += chunk_words << np.int64(halved)
                if ends:
                    far[PIECE], far[SHARE] = 0, far[SHARE] + blocks
                    far_source[0] = place(of, far[SHARE])
            full = ptx.barrier_test_wait(barriers, address, parity) == 0
        if full:
            await_barrier(barriers, address, parity, patience, fault)

    return await_free


def make_produce(shape: PersistentShape) -> Any:
    """Device function (weights, words, barriers, position, first, last, patience, fault, times): the producer's whole
    life; one thread.

    Args of it: weights uint32, all of the model's; words uint32 and barriers uint64, views of shared
    memory; ops first .. last - 1 are run.

    A copy takes memory 360 ns of each multiprocessor's time on an H100, and less out of the second-level cache: this
    one thread must not take longer over it. So slots and barriers are addresses that are counted up, and two barriers
    are looked at without asking whether there is anything to wait for yet: the first phase's parity says no.
    """
    slots, in_flight, blocks, ops = shape.slots, shape.in_flight, shape.sms, shape.ops
    slot_bytes, barriers_bytes = np.uint32(4 * shape.slot_words), np.uint32(8 * slots)
    landed, shares_of, dealt_of = shape.barriers_start, shape.picker("shares"), shape.picker("dealt")
    deal, kind_of, note = make_deal(blocks), make_kind_of(shape), make_note(shape)
    cut, place = make_cut(shape)
    await_free = make_await_free(shape, place)
    # What attention reads takes the time that is idle otherwise: so many chunks less are asked for ahead.
    most_ahead, kv_bytes = shape.ahead, 4 * shape.kv_heads * shape.head_dim
    ahead_bytes = blocks * 4 * shape.slot_words

    @ptx.device_function
    def following(barrier, turn, first, end):
        """The next slot's barrier, and the parity that goes with it."""
        barrier = np.uint32(barrier + np.uint32(8))
        return (first, np.uint32(turn ^ np.uint32(1))) if barrier == end else (barrier, turn)

    @ptx.large_device_function
    def produce(weights, words, barriers, position, first, last, patience, fault, times):
        far = cuda.local.array(4, int32)
        far_source = cuda.local.array(1, int64)
        far[LEAD], far[SHARE], far[PIECE], far[ASKED] = 0, 0, 0, np.int32(ptx.cycles_32())
        ahead = np.int32(max(most_ahead - position * kv_bytes // ahead_bytes, 0))
        first_slot, first_barrier = ptx.shared_address(words, 0), ptx.shared_address(barriers, landed)
        end = np.uint32(first_barrier + barriers_bytes)
        # The slot that is filled next, its barrier, and the parity of its last release; the oldest copy under way.
        slot, barrier, turn = first_slot, first_barrier, np.uint32(1)
        oldest, oldest_turn = np.uint32(end - np.uint32(8 * in_flight)), np.uint32(1)
        offset = np.int32(0)
        for op in range(1, ops):
            kind = kind_of(op)
            if kind == ATTENTION:
                continue
            of, shares = cut(words, op, kind), np.int32(shares_of(kind))
            chunk_words, pieces, halved, nbytes, last_bytes = of[2], of[3], of[4], of[5], of[6]
            share = np.int32(deal(offset)) if first <= op < last else shares
            if share < shares:
                note(times, op, COPY_BEGUN)
            far[LEAD] = 0  # what was asked for may be of another op
            while share < shares:
                source = place(of, share)
                for piece in range(pieces):
                    if ptx.barrier_test_wait(barriers, barrier + barriers_bytes, turn) == 0:
                        await_free(
                            *(weights, barriers, np.uint32(barrier + barriers_bytes), turn, share, piece, source),
                            *(of, shares, ahead, far, far_source, patience, fault),
                        )
                    await_barrier(barriers, oldest, oldest_turn, patience, fault)
                    size = last_bytes if piece == pieces - 1 else nbytes
                    ptx.barrier_arrive_expect(barriers, barrier, np.uint32(size << np.uint32(halved)))
                    ptx.bulk_copy(words, slot, weights, source, size, barriers, barrier)
                    if halved:
                        other = np.uint32(slot + nbytes)
                        ptx.bulk_copy(words, other, weights, source + chunk_words, nbytes, barriers, barrier)
                    source += chunk_words << np.int64(halved)
                    far[LEAD] -= 1
                    barrier, turn = following(barrier, turn, first_barrier, end)
                    slot = first_slot if barrier == first_barrier else np.uint32(slot + slot_bytes)
                    oldest, oldest_turn = following(oldest, oldest_turn, first_barrier, end)
                share = np.int32(share + np.int32(blocks))
                note(times, op, COPY_DONE)
            offset = np.int32((offset + dealt_of(kind)) % np.int32(blocks))
        # A block must not end while copies into its shared memory are on their way.
        for _ in range(in_flight):
            await_barrier(barriers, oldest, oldest_turn, patience, fault)
            oldest, oldest_turn = following(oldest, oldest_turn, first_barrier, end)

    return produce
