"""The persistent kernel: a token from its embedding to its logits and the next token, in one launch (a megakernel).

One CTA per SM, all resident at once (cooperative launch), runs through the ops of the step: embedding; per layer QKV
projection, attention, o, gate and up, down; LM head; arg-max. There is no grid-wide barrier between ops. Warps are
specialized:

- The producer warp (`pipeline.py`) issues TMA bulk copies of the weights of the CTA's work tiles, for all ops one after
  the other, into a pipeline of stages in shared memory, and runs ahead of the consumers as far as the stages allow.
- The consumer warps (`consume` below) take each op in turn: stage its input in shared memory (`staging.py`), multiply
  it by the weights as their stages become full (`projection.py`), and publish the results (`epilogue.py`); or compute
  attention (`attention.py`, `split_kv.py`).

Which CTA computes which work tile of an op is fixed in advance (`schedule.py`). Results reach other CTAs through the
mailbox in device memory, as words that carry a flag: when it matches, the data has arrived
(`comm/flagged.py`). A wait that lasts too long ends by a watchdog, which the host reports.

Launch: `shape.sms` CTAs of `CTA_THREADS` threads with `shape.dynamic_shared_bytes` of dynamic shared memory.
Cost model: the bytes of weights and KV cache, once; see docs/persistent-kernel.md for what it costs beside them.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import SPIN_LIMIT, Watchdog, ll_store_pair
from numba_atomflow.ops.cuda.persistent import rank
from numba_atomflow.ops.cuda.persistent.attention import LayerCache, make_attend
from numba_atomflow.ops.cuda.persistent.epilogue import make_epilogue, make_load_ahead
from numba_atomflow.ops.cuda.persistent.frame import make_frame
from numba_atomflow.ops.cuda.persistent.heads import make_heads_of
from numba_atomflow.ops.cuda.persistent.pipeline import make_first_work_tile
from numba_atomflow.ops.cuda.persistent.projection import BUFFER, CONSUMED, OpState, make_project
from numba_atomflow.ops.cuda.persistent.schedule import (
    ATTENTION,
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    CTA_THREADS,
    LM_HEAD,
    TABLE_UNIT,
    PersistentShape,
    layer_of,
    make_kind_of,
)
from numba_atomflow.ops.cuda.persistent.split_kv import AttentionIo, make_kv_split
from numba_atomflow.ops.cuda.persistent.staging import NormWeight, make_stage, sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import BEGUN, DONE, STAGED, make_record_clocks, make_timestamp
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32, u32
from numba_atomflow.ops.cuda.token.advance import post_token
from numba_atomflow.ops.cuda.token.embedding import make_quad
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, PENALTY, token_id, warp_max_key


class PersistentArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        weights: all weights of the model, 32-bit words.
        table: [shape.table_entries]; for each op the offsets of its weights and of its norm weight, in units of 128
            bytes; then, with `shape.rope_in_attention`, for each layer those of its bias of q, k and v, its norm of q
            and its norm of k.
        cache16, cache: the KV cache [layer][k, v][positions][kv_heads * head_dim] float16, as elements and as pairs.
        mailbox: [shape.mailbox.end] words of `comm/flagged.py`; zero before the first step.
        tokens: [1]. position: [1].
        steps: [2]; steps completed, and CTAs that have completed the current one; zero before the first.
        cosines, sines: [positions, head_dim / 2].
        residual: [hidden]; this and the next five are for validators: they repeat what the mailbox carries.
        x_norm, final_x_norm, attn_out, intermediate: pairs of float16. q: bits of float16.
        logits: [V]. seen: bitmap of the tokens so far. options: [5], of sampling. best: [1], `LOWEST_KEY` before.
        token_ring, tokens_posted: the pinned host ring, and [1], as in `advance.post_token`.
        fault: [1]; set when the watchdog of a CTA trips.
        timestamps: [CTAs, ops, EVENTS], written with `shape.trace`.
        kv_stride: elements from a layer's keys to its values, and from these to the next layer's keys.
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
    kv_stride: NUMBER
    first_op: NUMBER
    end_op: NUMBER
    greedy: NUMBER


def make_persistent(shape: PersistentShape) -> Any:
    """Kernel (`PersistentArguments`, or with `shape.rank` `RankArguments`)."""
    return make_frame(shape, _make_consume(shape))


def _make_consume(shape: PersistentShape) -> Any:
    """Device function (io, shared, thread): a step of the consumer warps, op by op.

    Arguments: io, `PersistentArguments`; shared, `SharedMemory`.
    """
    ops, ctas = shape.ops, shape.sms
    table_start, rope_start, half = shape.table_start, shape.rope_start, shape.head_dim // 2
    first_work_tile, kind_of = make_first_work_tile(ctas), make_kind_of(shape)
    work_tiles_of, advance_of = shape.by_kind(lambda plan: plan.work_tiles), shape.by_kind(shape.schedule_advance)
    timestamp, record_clocks, kv_split = make_timestamp(shape), make_record_clocks(shape), make_kv_split(shape)
    load_ahead, heads_of = make_load_ahead(shape), make_heads_of(shape)
    project, attend = make_project(shape, load_ahead, make_epilogue(shape, load_ahead)), make_attend(shape, timestamp)
    stage, reduce_best = make_stage(shape), _make_reduce_best(shape)
    parts = _one_gpu(shape, reduce_best) if shape.rank is None else rank.make_parts(shape, reduce_best)
    mailbox_of, logits_of, epoch_of = parts.mailbox_of, parts.logits_of, parts.epoch_of
    embed, end, patience = parts.embed, parts.end, parts.patience

    @ptx.large_device_function
    def consume(io, shared, thread):
        words, floats, mailbox, timestamps = shared.words, shared.floats, mailbox_of(io), io.timestamps
        progress = cuda.local.array(2, uint32)
        limit = cuda.local.array(1, uint32)
        best = cuda.local.array(1, int64)
        progress[BUFFER], progress[CONSUMED] = u32(0), u32(0)
        limit[0], best[0] = u32(SPIN_LIMIT * patience), int64(LOWEST_KEY)
        watchdog = Watchdog(limit, io.fault)
        tracing = thread == 0
        if tracing:
            record_clocks(timestamps, 0)
        epoch, position = epoch_of(io), io.position[0]
        penalty = np.float32(io.options[PENALTY])  # loaded once: every op would wait for it
        entry = thread
        while entry < half:
            floats[rope_start + entry] = io.cosines[position * half + entry]
            floats[rope_start + half + entry] = io.sines[position * half + entry]
            entry += CONSUMER_THREADS
        cta_split = kv_split(position)
        if io.first_op == 0:
            embed(io, words, epoch, thread)

        offset, work_tile = i32(0), i32(0)
        for op in range(1, ops):
            kind, layer, runs = kind_of(op), layer_of(op), io.first_op <= op < io.end_op
            input_flag = u32(epoch + u32(layer))
            flag = u32(input_flag + u32(1))
            keys_start = 2 * layer * io.kv_stride
            if kind == ATTENTION:
                if runs:
                    if tracing:
                        timestamp(timestamps, op, BEGUN)
                    cache = LayerCache(io.cache, keys_start // 2, (keys_start + io.kv_stride) // 2)
                    heads = heads_of(io, words, layer, position, op)
                    attention_io = AttentionIo(mailbox, io.attn_out, timestamps, op, flag, watchdog, heads)
                    attend(attention_io, i32(position), cta_split, cache, thread, shared)
                    if tracing:
                        timestamp(timestamps, op, DONE)
                continue
            work_tile = first_work_tile(offset)
            offset = (offset + advance_of(kind)) % i32(ctas)
            if runs and work_tile < work_tiles_of(kind):
                if tracing:
                    timestamp(timestamps, op, BEGUN)
                norm = NormWeight(io.weights, int64(words[table_start + 2 * op + 1]) * TABLE_UNIT)
                x_norm = io.final_x_norm if kind == LM_HEAD else io.x_norm
                stage(kind, mailbox, input_flag, flag, norm, x_norm, work_tile == 0, thread, shared, watchdog)
                if tracing:
                    timestamp(timestamps, op, STAGED)
                values_start = keys_start + io.kv_stride
                state = OpState(
                    *(mailbox, io.q, io.cache16, io.residual, io.intermediate, logits_of(io), io.seen, timestamps),
                    *(op, kind, input_flag, flag, position, penalty, keys_start, values_start, best, watchdog),
                )
                project(state, work_tile, thread, shared, progress)
                if tracing:
                    timestamp(timestamps, op, DONE)
        if tracing:
            record_clocks(timestamps, 1)
        end(io, epoch, work_tile, best, shared.keys, thread, watchdog)

    return consume


def _one_gpu(shape: PersistentShape, reduce_best: Any) -> rank.Parts:
    layers = shape.layers

    @ptx.device_function
    def mailbox_of(io):
        return io.mailbox

    @ptx.device_function
    def logits_of(io):
        return io.logits

    @ptx.device_function
    def epoch_of(io):
        return u32(io.steps[0] * (layers + 1) + 1)

    return rank.Parts(mailbox_of, logits_of, epoch_of, _make_embed(shape), _make_end(shape, reduce_best), 1)


def _make_embed(shape: PersistentShape) -> Any:
    """Device function (io, words, epoch, thread): the token's row of the embedding, to the mailbox."""
    quads, table_start = shape.hidden // 4, shape.table_start
    pairs, exact = shape.mailbox.residual_in, shape.mailbox.residual_in_exact
    look_up = make_quad(shape.embedding)

    @ptx.large_device_function
    def embed(io, words, epoch, thread):
        mailbox, residual = io.mailbox, io.residual
        quad = i32(cuda.blockIdx.x) * CONSUMER_THREADS + thread
        while quad < quads:
            row_start = int64(words[table_start]) * TABLE_UNIT
            x0, x1, x2, x3 = look_up(io.weights, row_start, int64(io.tokens[0]), int64(quad))
            index = quad * 4
            ll_store_pair(mailbox, pairs + index // 2, x0, x1, epoch)
            ll_store_pair(mailbox, pairs + index // 2 + 1, x2, x3, epoch)
            ptx.ll_store(mailbox, exact + index, ptx.f32_bits(x0), epoch)
            ptx.ll_store(mailbox, exact + index + 1, ptx.f32_bits(x1), epoch)
            ptx.ll_store(mailbox, exact + index + 2, ptx.f32_bits(x2), epoch)
            ptx.ll_store(mailbox, exact + index + 3, ptx.f32_bits(x3), epoch)
            residual[index], residual[index + 1], residual[index + 2], residual[index + 3] = x0, x1, x2, x3
            quad += i32(cuda.gridDim.x) * CONSUMER_THREADS

    return embed


def _make_reduce_best(shape: PersistentShape) -> Any:
    """Device function (key, keys, io, thread): the largest of the CTA's sort keys goes into `best` (arg-max)."""
    start = shape.reduction_start // 2

    @ptx.device_function
    def reduce_best(key, keys, io, thread):
        largest = warp_max_key(key)
        sync_consumers()
        if thread & 31 == 0:
            keys[start + (thread >> 5)] = largest
        sync_consumers()
        if thread == 0:
            for warp in range(CONSUMER_WARPS):
                largest = max(largest, keys[start + warp])
            # The results of a CTA whose watchdog tripped are wrong: the token gets the key of a NaN logit.
            cuda.atomic.max(io.best, 0, largest if io.fault[0] == 0 else int64(NAN_KEY))

    return reduce_best


def _make_end(shape: PersistentShape, reduce_best: Any) -> Any:
    """Device function (io, epoch, work_tile, best, keys, thread, watchdog): as in `rank.Parts`."""
    ops, work_tiles, end_step = shape.ops, shape.plans[LM_HEAD].work_tiles, _make_end_step(shape.sms)

    @ptx.device_function
    def end(io, epoch, work_tile, best, keys, thread, watchdog):
        if io.end_op == ops:
            if work_tile < work_tiles:
                reduce_best(best[0], keys, io, thread)
            sync_consumers()
            if thread == 0:
                end_step(io)

    return end


def _make_end_step(ctas: int) -> Any:
    """Device function (io): a CTA has completed its step; the last one to do so writes what the others have read. (A
    producer without a work tile may read the next position: it only shortens its prefetch distance.)
    """

    @ptx.device_function
    def end_step(io):
        steps = io.steps
        cuda.threadfence()  # the CTA's largest key is in `best` before the CTA is counted
        if cuda.atomic.add(steps, 1, 1) == ctas - 1:
            steps[0] += 1
            steps[1] = 0
            if io.greedy:
                cuda.threadfence()  # this CTA was counted last: the keys of the others are in `best`
                largest = cuda.atomic.exch(io.best, 0, int64(LOWEST_KEY))
                token = token_id(largest)
                io.tokens[0] = i32(token)
                io.position[0] += 1
                post_token(token, largest, io.seen, io.token_ring, len(io.token_ring), io.tokens_posted)

    return end_step


def persistent_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_persistent`."""
    name = "persistent" if shape.rank is None else "persistent_rank"
    signature = PersistentArguments if shape.rank is None else rank.RankArguments
    if shape.trace:
        name += "_traced"
    factory, shared_bytes = make_persistent, shape.dynamic_shared_bytes
    spec = kernel_spec(name, factory, signature, CTA_THREADS, shared_bytes, shape=shape)
    return Planned(replace(spec, cooperative=True), shape.sms)
