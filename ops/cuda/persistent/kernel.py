"""The persistent kernel: a token from its embedding to its logits and their largest, in one launch.

Launch: `shape.multiprocessors` blocks, all resident at once (cooperative), of `BLOCK_THREADS` threads with
`shape.block_bytes` of dynamic shared memory. Cost model: the bytes of weights and cache, once; see docs/persistent-kernel.md
for what it costs beside them.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numba import cuda, float32, int64, uint16, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.embedding import make_quad
from numba_atomflow.ops.cuda.persistent.attention import make_attend, make_share
from numba_atomflow.ops.cuda.persistent.exchange import PATIENCE, publish_pair
from numba_atomflow.ops.cuda.persistent.finish import make_finish, make_prepare
from numba_atomflow.ops.cuda.persistent.projection import CHUNKS, TURN, make_project
from numba_atomflow.ops.cuda.persistent.ring import make_deal, make_kind_of, make_produce
from numba_atomflow.ops.cuda.persistent.shape import (
    ATTENTION,
    BLOCK_THREADS,
    DOWN,
    GATE_UP,
    O,
    TABLE_UNIT,
    THREADS,
    VOCABULARY,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import make_stage_copy, make_stage_norm, meet
from numba_atomflow.ops.cuda.persistent.trace import BEGUN, DONE, STAGED, make_note, make_note_clocks
from numba_atomflow.ops.cuda.sample import BROKEN_KEY, LOWEST_KEY, PENALTY, shuffle_max
from numba_atomflow.ops.cuda.spec import F32, F64, I32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec

# Types of the kernel's arguments.
SIGNATURE = (
    U32,
    I64,
    U16,
    U32,
    U64,
    I32,
    I64,
    I64,
    F32,
    F32,
    F32,
    U32,
    U32,
    U16,
    U32,
    U32,
    F32,
    U32,
    F64,
    I64,
    I32,
    I64,
    NUMBER,
    NUMBER,
    NUMBER,
)


def make_persistent(shape: PersistentShape) -> Any:
    """Kernel with these arguments, one-dimensional arrays of device memory:

    weights uint32: all of the model's; table int64 [2 * ops]: for each op where its weights and its norm begin, in units of 128
    bytes; cache16 uint16 and cache uint32: the KV cache [layer][k, v][positions][kv_heads * head_dim] float16, seen in two
    ways; exchange uint64 [shape.exchange["end"]]; tokens int32 [1]; position int64 [1]; count int64 [1]: tokens made so far;
    cosines and sines float32 [positions, head_dim / 2]; residual float32 [hidden]; normed and final_normed uint32, ffn and
    attended uint32 (pairs of float16); q uint16; logits float32 [V]; seen uint32 bitmap; options float64 [5]; best int64 [1],
    `LOWEST_KEY` before; fault int32 [1]; times int64 [blocks, ops, EVENTS] (with `shape.trace`); plane: elements of a layer's keys;
    first and last: ops first .. last - 1 are run.
    """
    layers, ops, hidden, blocks = shape.layers, shape.ops, shape.hidden, shape.multiprocessors
    table_start, barriers_start, scalars, slots = (
        shape.table_start,
        shape.barriers_start,
        shape.scalars_start,
        shape.slots,
    )
    words_per_row, normed_words, x_start = hidden // 4, hidden // 2, shape.x_start
    entering, entering_exact, middle, attended_place, ffn_place = (
        shape.exchange[name] for name in ("entering", "entering_exact", "middle", "attended", "ffn")
    )
    look_up = make_quad(shape.embedding)
    produce, deal, kind_of, tiles_of = (
        make_produce(shape),
        make_deal(blocks),
        make_kind_of(shape),
        shape.picker("tiles"),
    )
    stage_norm = make_stage_norm(shape, shape.qkv.padded_columns)
    stage_attended = make_stage_copy(shape, shape.heads * shape.head_dim, shape.o.padded_columns)
    stage_ffn = make_stage_copy(shape, shape.ffn, shape.down.padded_columns)
    prepare = make_prepare(shape)
    half, rope_start, halves_head = shape.head_dim // 2, shape.rope_start, shape.vocabulary.halves
    share = make_share(shape)
    note, note_clocks = make_note(shape), make_note_clocks(shape)
    project, attend = make_project(shape, prepare, make_finish(shape, prepare)), make_attend(shape, note)

    @ptx.large_device_function
    def embed(weights, words, tokens, exchange, epoch, residual, thread):  # type: ignore[no-untyped-def]
        index = np.int32(cuda.blockIdx.x) * THREADS + thread
        if index < words_per_row:
            x0, x1, x2, x3 = look_up(weights, int64(words[table_start]) * TABLE_UNIT, int64(tokens[0]), int64(index))
            at = index * 4
            publish_pair(exchange, entering + at // 2, x0, x1, epoch)
            publish_pair(exchange, entering + at // 2 + 1, x2, x3, epoch)
            ptx.publish(exchange, entering_exact + at, ptx.f32_bits(x0), epoch)
            ptx.publish(exchange, entering_exact + at + 1, ptx.f32_bits(x1), epoch)
            ptx.publish(exchange, entering_exact + at + 2, ptx.f32_bits(x2), epoch)
            ptx.publish(exchange, entering_exact + at + 3, ptx.f32_bits(x3), epoch)
            residual[at], residual[at + 1], residual[at + 2], residual[at + 3] = x0, x1, x2, x3

    @ptx.device_function
    def report(normed, mixed, thread, words):  # type: ignore[no-untyped-def]
        """The normalised vector, for whoever validates: by the block with the first tile."""
        word = thread * 2
        while word < normed_words:
            a, b = words[x_start + word], words[x_start + word + 1]
            odd = mixed and word & 2 != 0
            normed[word] = ptx.low_halves(b, a) if odd else a
            normed[word + 1] = ptx.high_halves(b, a) if odd else b
            word += 2 * THREADS

    @ptx.large_device_function
    def consume(  # type: ignore[no-untyped-def]
        weights,
        cache16,
        cache,
        exchange,
        tokens,
        position,
        count,
        cosines,
        sines,
        residual,
        normed,
        final_normed,
        q,
        attended,
        ffn,
        logits,
        seen,
        options,
        best,
        fault,
        times,
        plane,
        first,
        last,
        thread,
        words,
        halves,
        floats,
        keys,
        barriers,
    ):
        state = cuda.local.array(2, uint32)
        patience = cuda.local.array(1, uint32)
        own_best = cuda.local.array(1, int64)
        state[TURN], state[CHUNKS] = np.uint32(0), np.uint32(0)
        patience[0] = np.uint32(PATIENCE)
        epoch = np.uint32(count[0] * (layers + 1) + 1)
        place = position[0]
        penalty = np.float32(options[PENALTY])
        if thread == 0:
            note_clocks(times, 0)
        own_best[0] = int64(LOWEST_KEY)
        offset = np.int32(0)
        entry = thread
        while entry < half:
            floats[rope_start + entry] = cosines[place * half + entry]
            floats[rope_start + half + entry] = sines[place * half + entry]
            entry += THREADS
        kv, split, chunk, active = share(place)
        if first == 0:
            embed(weights, words, tokens, exchange, epoch, residual, thread)
        for op in range(1, ops):
            kind = kind_of(op)
            layer = (op - 1) // 5
            before = np.uint32(epoch + np.uint32(layer))
            now = np.uint32(before + np.uint32(1))
            keys_at = 2 * layer * plane
            values_at = keys_at + plane
            run = first <= op < last
            if kind == ATTENTION:
                if run:
                    if thread == 0:
                        note(times, op, BEGUN)
                    attend(
                        exchange,
                        now,
                        np.int32(place),
                        kv,
                        split,
                        chunk,
                        active,
                        cache,
                        keys_at // 2,
                        values_at // 2,
                        attended,
                        thread,
                        words,
                        halves,
                        floats,
                        patience,
                        fault,
                        times,
                        op,
                    )
                    if thread == 0:
                        note(times, op, DONE)
            else:
                own, tiles = deal(offset), tiles_of(kind)
                offset = (offset + tiles) % np.int32(blocks)
                if run and own < tiles:
                    if thread == 0:
                        note(times, op, BEGUN)
                    if kind == O:
                        stage_attended(exchange, attended_place, now, thread, words, patience, fault)
                    elif kind == DOWN:
                        stage_ffn(exchange, ffn_place, now, thread, words, patience, fault)
                    else:
                        norm = int64(words[table_start + 2 * op + 1]) * TABLE_UNIT
                        start, since = (middle, now) if kind == GATE_UP else (entering, before)
                        mixed = kind != VOCABULARY or not halves_head
                        stage_norm(exchange, start, since, weights, norm, mixed, thread, words, floats, patience, fault)
                        if own == 0:
                            report(final_normed if kind == VOCABULARY else normed, mixed, thread, words)
                    if thread == 0:
                        note(times, op, STAGED)
                    given = (
                        exchange,
                        before,
                        now,
                        place,
                        q,
                        cache16,
                        keys_at,
                        values_at,
                        residual,
                        ffn,
                        logits,
                        seen,
                        penalty,
                        own_best,
                    )
                    project(kind, own, thread, words, floats, barriers, state, patience, fault, given, times, op)
                    if thread == 0:
                        note(times, op, DONE)
        if thread == 0:
            note_clocks(times, 1)
        if first < ops <= last and deal(offset - tiles_of(VOCABULARY) % np.int32(blocks)) < tiles_of(VOCABULARY):
            largest = shuffle_max(own_best[0])
            meet()
            if thread & 31 == 0:
                keys[scalars // 2 + (thread >> 5)] = largest
            meet()
            if thread == 0:
                for warp in range(THREADS // 32):
                    largest = max(largest, keys[scalars // 2 + warp])
                # A block that gave up waiting has computed nonsense: the token is marked as one without logits.
                cuda.atomic.max(best, 0, largest if fault[0] == 0 else int64(BROKEN_KEY))

    @ptx.kernel(BLOCK_THREADS, 1)
    def persistent(  # type: ignore[no-untyped-def]
        weights,
        table,
        cache16,
        cache,
        exchange,
        tokens,
        position,
        count,
        cosines,
        sines,
        residual,
        normed,
        final_normed,
        q,
        attended,
        ffn,
        logits,
        seen,
        options,
        best,
        fault,
        times,
        plane,
        first,
        last,
    ):
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        halves = cuda.shared.array(0, uint16)
        keys = cuda.shared.array(0, int64)
        barriers = cuda.shared.array(0, uint64)
        thread = np.int32(cuda.threadIdx.x)
        entry = thread
        while entry < 2 * ops:
            words[table_start + entry] = np.uint32(table[entry])
            entry += BLOCK_THREADS
        if thread == 0:
            for slot in range(2 * slots):
                ptx.barrier_init(barriers, barriers_start + slot, 1)
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread >= THREADS:
            if thread == THREADS:
                patience = cuda.local.array(1, uint32)
                patience[0] = np.uint32(PATIENCE)
                produce(weights, cache, plane, position[0], words, barriers, first, last, patience, fault, times)
        else:
            consume(
                weights,
                cache16,
                cache,
                exchange,
                tokens,
                position,
                count,
                cosines,
                sines,
                residual,
                normed,
                final_normed,
                q,
                attended,
                ffn,
                logits,
                seen,
                options,
                best,
                fault,
                times,
                plane,
                first,
                last,
                thread,
                words,
                halves,
                floats,
                keys,
                barriers,
            )

    return persistent


def persistent_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_persistent`."""
    name = "persistent_traced" if shape.trace else "persistent"
    factory = "persistent.kernel:make_persistent"
    spec = kernel_spec(name, factory, SIGNATURE, BLOCK_THREADS, shape.block_bytes, shape=shape)
    return Planned(replace(spec, cooperative=True), shape.multiprocessors)
