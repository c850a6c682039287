"""The shared-memory pipeline: the producer warp issues bulk copies of weights, the consumer warps read them.

The producer has the whole step's schedule from the start: which work tiles its CTA has of which projection. It never
waits for an op to complete, only for an empty stage, so the copies of the next op's weights are under way, or complete,
while the CTAs still exchange the results of this one. At most `copies_in_flight` copies are under way at a time: they
saturate memory, and small accesses (mailbox, KV cache) do not queue behind more.

While the pipeline is full, memory would idle: the producer then issues L2 prefetches for the next k-tiles of this op,
which take less time to copy from there. It paces them at memory's own rate.

Stage n % stages holds k-tile n of the CTA (of an 8-row work tile, the same rows of two k-tiles, which count as one
here). Each stage has two mbarriers: `full` completes a phase when the bytes have arrived, `empty` when the consumer
warp has them in registers. K-tile n waits for the phase of parity (n // stages) & 1 of `full`.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int32, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import (
    ATTENTION,
    TABLE_UNIT,
    PersistentShape,
    make_kind_of,
)
from numba_atomflow.ops.cuda.persistent.trace import COPY_BEGUN, COPY_DONE, make_timestamp
from numba_atomflow.ops.cuda.scalars import i32, u32

LEAD, WORK_TILE, K_TILE, ISSUED = range(4)  # of `PrefetchCursor.state`


class WeightCopies(NamedTuple):
    """The weights of an op, and the bulk copies of a work tile.

    Attributes:
        start: word of the model's weights at which they begin.
        tile_words, k_tile_words: from one 16-row tile to the next, and from one k-tile to the next.
        stages: that a work tile takes.
        half_tiles: 1 if work tiles have 8 rows, else 0; then a stage takes two copies, of the same rows of two k-tiles.
        k_halves: 1 if work tiles are halves of tiles along K, else 0.
        copy_bytes, last_copy_bytes: of a copy, and of the work tile's last one.
    """

    start: Any
    tile_words: Any
    k_tile_words: Any
    stages: Any
    half_tiles: Any
    k_halves: Any
    copy_bytes: Any
    last_copy_bytes: Any


class PrefetchCursor(NamedTuple):
    """What the producer prefetches into L2 next.

    Attributes:
        state: int32 [4]: k-tiles prefetched and not copied yet (`LEAD`), work tile and k-tile of the next prefetch, and
            the cycle at which the last one was issued (`ISSUED`).
        source: int64 [1]: word of the weights at which the next one begins.
    """

    state: Any
    source: Any


@ptx.device_function
def await_barrier(barriers, address, parity, watchdog):
    """Wait for a phase of an mbarrier, or until the watchdog trips."""
    polls = u32(0)
    while ptx.barrier_try_wait(barriers, address, parity) == 0:
        polls = u32(polls + u32(1))
        if watchdog_trips(watchdog, polls):
            break


def make_first_work_tile(ctas: int) -> Any:
    """Device function (offset) -> the CTA's first work tile of a projection that begins at this CTA of the schedule."""

    @ptx.device_function
    def first_work_tile(offset):
        return (i32(cuda.blockIdx.x) + i32(ctas) - offset) % i32(ctas)

    return first_work_tile


def make_weight_copies(shape: PersistentShape) -> tuple[Any, Any]:
    """Device functions of the weights in memory.

    Returns:
        weight_copies (words, op, kind) -> `WeightCopies`; words: view of shared memory.
        source_of (copies, work_tile) -> word of the model's weights at which a work tile begins.
    """
    table_start = shape.table_start
    stages_of = shape.by_kind(lambda plan: plan.work_tile_stages)
    half_tiles_of = shape.by_kind(lambda plan: int(plan.half_tiles))
    k_halves_of = shape.by_kind(lambda plan: int(plan.k_halves))
    any_k_halves = any(plan.k_halves for plan in shape.plans.values())
    tile_words_of = shape.by_kind(lambda plan: plan.layout.tile_words)
    k_tile_words_of = shape.by_kind(lambda plan: plan.layout.k_tile_words)
    last_words_of = shape.by_kind(lambda plan: plan.layout.last_k_tile_words)

    @ptx.device_function
    def weight_copies(words, op, kind):
        start = np.int64(words[table_start + 2 * op]) * TABLE_UNIT
        half_tiles, k_tile_words = i32(half_tiles_of(kind)), np.int64(k_tile_words_of(kind))
        copy_bytes = u32(4 * k_tile_words >> np.int64(half_tiles))
        last_copy_bytes = copy_bytes if half_tiles else u32(4 * last_words_of(kind))
        tile_words, stages = np.int64(tile_words_of(kind)), i32(stages_of(kind))
        k_halves = i32(k_halves_of(kind))
        return WeightCopies(start, tile_words, k_tile_words, stages, half_tiles, k_halves, copy_bytes, last_copy_bytes)

    @ptx.device_function
    def source_of(copies, work_tile):
        start, tile_words, half_tiles = copies.start, copies.tile_words, copies.half_tiles
        if any_k_halves:
            start += np.int64(work_tile & copies.k_halves) * copies.k_tile_words * copies.stages
            work_tile = work_tile >> copies.k_halves
        tile = start + np.int64(work_tile >> half_tiles) * tile_words
        return tile + np.int64(work_tile & half_tiles) * (copies.k_tile_words // 2)

    return weight_copies, source_of


def make_await_empty(shape: PersistentShape, source_of: Any) -> Any:
    """Device function (weights, barriers, address, parity, work_tile, k_tile, source, copies, work_tiles, distance,
    cursor, watchdog): wait until a stage is empty, and issue L2 prefetches meanwhile.

    Arguments: address and parity of the stage's empty barrier; work_tile, k_tile, source: what is copied to the stage
    next; work_tiles, of the projection; distance, k-tiles from that one on that may be prefetched.
    """
    interval, ctas = i32(shape.prefetch_interval_cycles), i32(shape.sms)

    @ptx.large_device_function
    def await_empty(
        weights, barriers, address, parity, work_tile, k_tile, source, copies, work_tiles, distance, cursor, watchdog
    ):
        state, next_source = cursor.state, cursor.source
        k_tile_words, stages, half_tiles = copies.k_tile_words, copies.stages, copies.half_tiles
        copy_bytes, last_copy_bytes = copies.copy_bytes, copies.last_copy_bytes
        if state[LEAD] <= 0:
            state[LEAD], state[WORK_TILE], state[K_TILE], next_source[0] = 0, work_tile, k_tile, source
        occupied = True
        while occupied and state[LEAD] < distance and state[WORK_TILE] < work_tiles:
            now = i32(ptx.cycles_32())
            if i32(now - state[ISSUED]) >= interval:
                state[ISSUED] = now
                state[LEAD] += 1
                state[K_TILE] += 1
                last = state[K_TILE] == stages
                ptx.bulk_prefetch_l2(weights, next_source[0], last_copy_bytes if last else copy_bytes)
                if half_tiles:
                    ptx.bulk_prefetch_l2(weights, next_source[0] + k_tile_words, copy_bytes)
                next_source[0] += k_tile_words << np.int64(half_tiles)
                if last:
                    state[K_TILE], state[WORK_TILE] = 0, state[WORK_TILE] + ctas
                    next_source[0] = source_of(copies, state[WORK_TILE])
            occupied = ptx.barrier_test_wait(barriers, address, parity) == 0
        if occupied:
            await_barrier(barriers, address, parity, watchdog)

    return await_empty


def make_produce(shape: PersistentShape) -> Any:
    """Device function (io, shared, watchdog): the producer warp, of which one thread works.

    Arguments: io, `PersistentArguments`; shared, `SharedMemory`.

    An H100's memory delivers a k-tile to each SM every 366 ns, and L2 faster: this thread must issue a copy in less
    time. So stages and barriers are addresses that are incremented, and two barriers are polled without a test whether
    there is anything to wait for yet: the parity of the phase before the first says that there is not.
    """
    stages, copies_in_flight, ctas, ops = shape.stages, shape.copies_in_flight, shape.sms, shape.ops
    stage_bytes, barriers_bytes = u32(4 * shape.stage_words), u32(8 * stages)
    full_start, work_tiles_of = shape.full_start, shape.by_kind(lambda plan: plan.work_tiles)
    advance_of, first_work_tile = shape.by_kind(shape.schedule_advance), make_first_work_tile(ctas)
    kind_of, timestamp = make_kind_of(shape), make_timestamp(shape)
    weight_copies, source_of = make_weight_copies(shape)
    await_empty = make_await_empty(shape, source_of)
    # Reading the KV cache takes the time in which memory would idle: so many k-tiles less are prefetched.
    max_distance, kv_bytes = shape.prefetch_distance, 4 * shape.kv_heads * shape.head_dim
    k_tiles_bytes = ctas * 4 * shape.stage_words

    @ptx.device_function
    def next_barrier(barrier, parity, first, end):
        """The next stage's barrier (address), and the parity to wait for there."""
        barrier = u32(barrier + u32(8))
        return (first, u32(parity ^ u32(1))) if barrier == end else (barrier, parity)

    @ptx.large_device_function
    def produce(io, shared, watchdog):
        weights, words, barriers = io.weights, shared.words, shared.barriers
        position = io.position[0]
        state = cuda.local.array(4, int32)
        next_source = cuda.local.array(1, int64)
        state[LEAD], state[WORK_TILE], state[K_TILE], state[ISSUED] = 0, 0, 0, i32(ptx.cycles_32())
        distance = i32(max(max_distance - position * kv_bytes // k_tiles_bytes, 0))
        cursor = PrefetchCursor(state, next_source)
        first_stage, first_full = ptx.shared_address(words, 0), ptx.shared_address(barriers, full_start)
        end = u32(first_full + barriers_bytes)
        # The stage that is filled next, its full barrier, the parity of its last release; the oldest copy under way.
        stage, full, parity = first_stage, first_full, u32(1)
        oldest, oldest_parity = u32(end - u32(8 * copies_in_flight)), u32(1)
        offset = i32(0)
        for op in range(1, ops):
            kind = kind_of(op)
            if kind == ATTENTION:
                continue
            copies, work_tiles = weight_copies(words, op, kind), i32(work_tiles_of(kind))
            k_tile_words, half_tiles = copies.k_tile_words, copies.half_tiles
            copy_bytes, last_copy_bytes = copies.copy_bytes, copies.last_copy_bytes
            work_tile = i32(first_work_tile(offset)) if io.first_op <= op < io.end_op else work_tiles
            if work_tile < work_tiles:
                timestamp(io.timestamps, op, COPY_BEGUN)
            state[LEAD] = 0  # earlier prefetches may be of another op
            while work_tile < work_tiles:
                source = source_of(copies, work_tile)
                for k_tile in range(copies.stages):
                    empty = u32(full + barriers_bytes)
                    if ptx.barrier_test_wait(barriers, empty, parity) == 0:
                        await_empty(
                            *(weights, barriers, empty, parity, work_tile, k_tile, source),
                            *(copies, work_tiles, distance, cursor, watchdog),
                        )
                    await_barrier(barriers, oldest, oldest_parity, watchdog)
                    nbytes = last_copy_bytes if k_tile == copies.stages - 1 else copy_bytes
                    ptx.barrier_arrive_expect(barriers, full, u32(nbytes << u32(half_tiles)))
                    ptx.bulk_copy(words, stage, weights, source, nbytes, barriers, full)
                    if half_tiles:
                        second = u32(stage + copy_bytes)
                        ptx.bulk_copy(words, second, weights, source + k_tile_words, copy_bytes, barriers, full)
                    source += k_tile_words << np.int64(half_tiles)
                    state[LEAD] -= 1
                    full, parity = next_barrier(full, parity, first_full, end)
                    stage = first_stage if full == first_full else u32(stage + stage_bytes)
                    oldest, oldest_parity = next_barrier(oldest, oldest_parity, first_full, end)
                work_tile = i32(work_tile + i32(ctas))
                timestamp(io.timestamps, op, COPY_DONE)
            offset = i32((offset + advance_of(kind)) % i32(ctas))
        # A CTA must not end while copies into its shared memory are under way.
        for _ in range(copies_in_flight):
            await_barrier(barriers, oldest, oldest_parity, watchdog)
            oldest, oldest_parity = next_barrier(oldest, oldest_parity, first_full, end)

    return produce
