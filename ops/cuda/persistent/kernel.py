"""The persistent kernel: a token from its embedding to its logits and the next token, in one launch.

Launch: `shape.sms` blocks, all resident at once (cooperative), of `BLOCK_THREADS` threads with
`shape.block_bytes` of dynamic shared memory. Cost model: the bytes of weights and cache, once; see
docs/persistent-kernel.md for what it costs beside them.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int64, uint16, uint32, uint64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import PATIENCE, publish_pair
from numba_atomflow.ops.cuda.persistent.attention import make_attend, make_share
from numba_atomflow.ops.cuda.persistent.epilogue import make_finish, make_prepare
from numba_atomflow.ops.cuda.persistent.pipeline import make_deal, make_kind_of, make_produce
from numba_atomflow.ops.cuda.persistent.projection import CHUNKS, TURN, make_project
from numba_atomflow.ops.cuda.persistent.schedule import (
    ATTENTION,
    BLOCK_THREADS,
    CONSUMERS,
    DOWN,
    GATE_UP,
    OUT,
    TABLE_UNIT,
    THREADS,
    VOCABULARY,
    PersistentShape,
)
from numba_atomflow.ops.cuda.persistent.staging import make_stage_copy, make_stage_norm, meet, swizzled
from numba_atomflow.ops.cuda.persistent.trace import BEGUN, DONE, STAGED, make_note, make_note_clocks
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.token.advance import post_token
from numba_atomflow.ops.cuda.token.embedding import make_quad
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, PENALTY, token_id, warp_max_key


class PersistentArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        weights: all weights of the model, 32-bit words.
        table: [2 * ops]; for each op the offsets of its weights and of its norm weight, in units of 128 bytes.
        cache16, cache: the KV cache [layer][k, v][positions][kv_heads * head_dim] float16, as elements and as pairs.
        mailbox: [shape.exchange["end"]] words of `comm/flagged.py`; zero before the first step.
        tokens: [1]. position: [1].
        steps: [2]; steps completed, and CTAs that have completed the current one; zero before the first.
        cosines, sines: [positions, head_dim / 2].
        residual: [hidden]; this and the next five are for validators: they repeat what the mailbox carries.
        x_norm, final_x_norm, attn_out, intermediate: pairs of float16. q: bits of float16.
        logits: [V]. seen: bitmap of the tokens so far. options: [5], of sampling. best: [1], `LOWEST_KEY` before.
        token_ring, tokens_posted: the pinned host ring, and [1], as in `post_token`.
        fault: [1]; set when the watchdog of a CTA trips.
        timestamps: [CTAs, ops, EVENTS], written with `shape.trace`.
        plane: elements of a layer's keys.
        first_op, end_op: ops first_op .. end_op - 1 are run.
        greedy: 1: the most likely token is taken, and the step ends with it; 0 leaves that to the kernels that follow.
    """

    weights: U32
    table: I64
    cache16: U16
    cache: U32
    mailbox: U64
    tokens: I32
    position: I64
    steps: I64
    cosines: F32
    sines: F32
    residual: F32
    x_norm: U32
    final_x_norm: U32
    q: U16
    attn_out: U32
    intermediate: U32
    logits: F32
    seen: U32
    options: F64
    best: I64
    token_ring: U64
    tokens_posted: I64
    fault: I32
    timestamps: I64
    plane: NUMBER
    first_op: NUMBER
    end_op: NUMBER
    greedy: NUMBER


def make_persistent(shape: PersistentShape) -> Any:
    """Kernel (`PersistentArguments`)."""
    layers, ops, blocks, slots = shape.layers, shape.ops, shape.sms, shape.slots
    table_start, barriers_start, rope_start = shape.table_start, shape.barriers_start, shape.rope_start
    half = shape.head_dim // 2
    deal, kind_of = make_deal(blocks), make_kind_of(shape)
    shares_of, dealt_of = shape.picker("shares"), shape.picker("dealt")
    prepare, (note, note_clocks) = make_prepare(shape), (make_note(shape), make_note_clocks(shape))
    produce, embed, stage = make_produce(shape), _make_embed(shape), _make_stage(shape)
    project, attend = make_project(shape, prepare, make_finish(shape, prepare)), make_attend(shape, note)
    share, settle_best, end_step = make_share(shape), _make_settle_best(shape), _make_end_step(blocks)

    @ptx.large_device_function
    def consume(io, shared, thread):
        """A step of a consumer warp. io: `PersistentArguments`; shared: views of shared memory."""
        words, _, floats, keys, barriers = shared
        fault, times = io.fault, io.timestamps
        state = cuda.local.array(2, uint32)
        patience = cuda.local.array(1, uint32)
        own_best = cuda.local.array(1, int64)
        state[TURN], state[CHUNKS] = np.uint32(0), np.uint32(0)
        patience[0], own_best[0] = np.uint32(PATIENCE), int64(LOWEST_KEY)
        noting = thread == 0
        if noting:
            note_clocks(times, 0)
        epoch, place = np.uint32(io.steps[0] * (layers + 1) + 1), io.position[0]
        penalty = np.float32(io.options[PENALTY])  # here, as every op would wait for it
        entry = thread
        while entry < half:
            floats[rope_start + entry] = io.cosines[place * half + entry]
            floats[rope_start + half + entry] = io.sines[place * half + entry]
            entry += THREADS
        part = share(place)
        if io.first_op == 0:
            embed(io.weights, words, io.tokens, io.mailbox, epoch, io.residual, thread)

        offset, own = np.int32(0), np.int32(0)
        for op in range(1, ops):
            kind, layer, run = kind_of(op), (op - 1) // 5, io.first_op <= op < io.end_op
            before = np.uint32(epoch + np.uint32(layer))
            now = np.uint32(before + np.uint32(1))
            keys_at = 2 * layer * io.plane
            if kind == ATTENTION:
                if run:
                    if noting:
                        note(times, op, BEGUN)
                    cached = io.cache, keys_at // 2, (keys_at + io.plane) // 2
                    at = np.int32(place)
                    attend(io.mailbox, now, at, part, cached, io.attn_out, thread, shared, patience, fault, times, op)
                    if noting:
                        note(times, op, DONE)
                continue
            own = deal(offset)
            offset = (offset + dealt_of(kind)) % np.int32(blocks)
            if run and own < shares_of(kind):
                if noting:
                    note(times, op, BEGUN)
                norm = io.weights, int64(words[table_start + 2 * op + 1]) * TABLE_UNIT
                shown = io.final_x_norm if kind == VOCABULARY else io.x_norm
                stage(kind, io.mailbox, before, now, norm, shown, own == 0, thread, shared, patience, fault)
                if noting:
                    note(times, op, STAGED)
                given = (
                    *(io.mailbox, before, now, place, io.q, io.cache16, keys_at, keys_at + io.plane, io.residual),
                    *(io.intermediate, io.logits, io.seen, penalty, own_best, patience, fault),
                )
                project(kind, own, thread, words, floats, barriers, state, patience, fault, given, times, op)
                if noting:
                    note(times, op, DONE)
        if noting:
            note_clocks(times, 1)
        if io.end_op == ops:
            if own < shares_of(VOCABULARY):
                settle_best(own_best[0], keys, io.best, fault, thread)
            meet()
            if thread == 0:
                end_step(io.steps, io.greedy, io.best, io.tokens, io.position, io.seen, io.token_ring, io.tokens_posted)

    @ptx.kernel(BLOCK_THREADS, 1)
    def persistent(io):
        words = cuda.shared.array(0, uint32)
        floats = cuda.shared.array(0, float32)
        halves = cuda.shared.array(0, uint16)
        keys = cuda.shared.array(0, int64)
        barriers = cuda.shared.array(0, uint64)
        thread = np.int32(cuda.threadIdx.x)
        entry = thread
        while entry < 2 * ops:
            words[table_start + entry] = np.uint32(io.table[entry])
            entry += BLOCK_THREADS
        if thread == 0:
            for slot in range(2 * slots):
                ptx.barrier_init(barriers, ptx.shared_address(barriers, barriers_start + slot), 1)
            ptx.fence_barriers()
        cuda.syncthreads()
        if thread < THREADS:
            consume(io, (words, halves, floats, keys, barriers), thread)
        elif thread == THREADS:
            patience = cuda.local.array(1, uint32)
            patience[0] = np.uint32(PATIENCE)
            produce(
                io.weights, words, barriers, io.position[0], io.first_op, io.end_op, patience, io.fault, io.timestamps
            )

    return persistent


def _make_embed(shape: PersistentShape) -> Any:
    """Device function (weights, words, tokens, exchange, epoch, residual, thread): the token's row of the embedding."""
    quads, table_start = shape.hidden // 4, shape.table_start
    pairs, exact = shape.exchange["entering"], shape.exchange["entering_exact"]
    look_up = make_quad(shape.embedding)

    @ptx.large_device_function
    def embed(weights, words, tokens, exchange, epoch, residual, thread):
        quad = np.int32(cuda.blockIdx.x) * THREADS + thread
        while quad < quads:
            x0, x1, x2, x3 = look_up(weights, int64(words[table_start]) * TABLE_UNIT, int64(tokens[0]), int64(quad))
            at = quad * 4
            publish_pair(exchange, pairs + at // 2, x0, x1, epoch)
            publish_pair(exchange, pairs + at // 2 + 1, x2, x3, epoch)
            ptx.ll_store(exchange, exact + at, ptx.f32_bits(x0), epoch)
            ptx.ll_store(exchange, exact + at + 1, ptx.f32_bits(x1), epoch)
            ptx.ll_store(exchange, exact + at + 2, ptx.f32_bits(x2), epoch)
            ptx.ll_store(exchange, exact + at + 3, ptx.f32_bits(x3), epoch)
            residual[at], residual[at + 1], residual[at + 2], residual[at + 3] = x0, x1, x2, x3
            quad += np.int32(cuda.gridDim.x) * THREADS

    return embed


def _make_stage(shape: PersistentShape) -> Any:
    """Device function (kind, exchange, before, now, norm, normed, first, thread, shared, patience, fault): what
    a projection reads, to shared memory. The block with the first share also writes a normalised vector to `normed`.

    Args of it: norm: the model's weights, and the word at which the norm's begin.
    """
    words_of_x, x_start = shape.hidden // 2, shape.x_start
    entering, middle, attended, ffn = (shape.exchange[name] for name in ("entering", "middle", "attended", "ffn"))
    stage_norm = make_stage_norm(shape, shape.qkv.padded_in_features)
    stage_attended = make_stage_copy(shape, shape.heads * shape.head_dim, shape.o.padded_in_features)
    stage_ffn = make_stage_copy(shape, shape.ffn, shape.down.padded_in_features)

    @ptx.device_function
    def report(normed, thread, words):
        word = thread
        while word < words_of_x:
            normed[word] = words[x_start + swizzled(word)]
            word += THREADS

    @ptx.large_device_function
    def stage(kind, exchange, before, now, norm, normed, first, thread, shared, patience, fault):
        words, floats = shared[0], shared[2]
        if kind == OUT:
            stage_attended(exchange, attended, now, thread, words, patience, fault)
        elif kind == DOWN:
            stage_ffn(exchange, ffn, now, thread, words, patience, fault)
        else:
            start, epoch = (middle, now) if kind == GATE_UP else (entering, before)
            stage_norm(exchange, start, epoch, norm[0], norm[1], thread, words, floats, patience, fault)
            if first:
                report(normed, thread, words)

    return stage


def _make_settle_best(shape: PersistentShape) -> Any:
    """Device function (key, keys, best, fault, thread): the largest of the block's keys goes into `best`."""
    start = shape.scalars_start // 2

    @ptx.device_function
    def settle_best(key, keys, best, fault, thread):
        largest = warp_max_key(key)
        meet()
        if thread & 31 == 0:
            keys[start + (thread >> 5)] = largest
        meet()
        if thread == 0:
            for warp in range(CONSUMERS):
                largest = max(largest, keys[start + warp])
            # A block that gave up waiting has computed nonsense: the token is marked as one without logits.
            cuda.atomic.max(best, 0, largest if fault[0] == 0 else int64(NAN_KEY))

    return settle_best


def _make_end_step(blocks: int) -> Any:
    """Device function (steps, choose, best, tokens, position, seen, ring_entries, count): a block has ended its step;
    the last one to do so changes what the others have read. (A producer without a share may read the next position: it
    only makes less of asking ahead.)
    """

    @ptx.device_function
    def end_step(steps, choose, best, tokens, position, seen, ring_entries, count):
        cuda.threadfence()  # the block's largest key is in `best` before the block is counted
        if cuda.atomic.add(steps, 1, 1) == blocks - 1:
            steps[0] += 1
            steps[1] = 0
            if choose:
                cuda.threadfence()  # it was the last to be counted: now the others' keys are there
                largest = cuda.atomic.exch(best, 0, int64(LOWEST_KEY))
                token = token_id(largest)
                tokens[0] = np.int32(token)
                position[0] += 1
                post_token(token, largest, seen, ring_entries, len(ring_entries), count)

    return end_step


def persistent_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_persistent`."""
    name = "persistent_traced" if shape.trace else "persistent"
    factory = make_persistent
    spec = kernel_spec(name, factory, PersistentArguments, BLOCK_THREADS, shape.block_bytes, shape=shape)
    return Planned(replace(spec, cooperative=True), shape.sms)
