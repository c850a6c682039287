"""The persistent kernel for 2, 4 or 8 columns: a step of so many tokens at consecutive positions, from their embedding
to their logits, in one launch; weights are read once.

It is the kernel of `kernel.py` (producer, pipeline, schedule, flagged words) with a vector of everything per column.
Column c has the bits that a step of one token at its position gives, logits, keys and values alike: every sum has the
same order, every result is rounded at the same place. Each column is written to the mailbox beside the others, under
the same flags; the inputs of `o` and `down` have none (`wide_vectors.py`). The most likely token after each column is
posted to the host; the position is left as it is.

With `shape.rank` it is the kernel of one of several GPUs: what crosses between them goes through `comm/exchange.py`, as
in the kernel for one column, and `wide_rank.py` has how the step begins and ends.

Launch: `shape.sms` CTAs of `CTA_THREADS` threads with `shape.dynamic_shared_bytes` of dynamic shared memory.
Cost model: the bytes of weights and KV cache, once; the columns' words, which every CTA reads from L2.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.flagged import SPIN_LIMIT, Watchdog, ll_store_pair
from numba_atomflow.ops.cuda.persistent import wide_rank
from numba_atomflow.ops.cuda.persistent.frame import make_frame
from numba_atomflow.ops.cuda.persistent.heads import make_heads_of
from numba_atomflow.ops.cuda.persistent.pipeline import make_first_work_tile
from numba_atomflow.ops.cuda.persistent.projection import BUFFER, CONSUMED
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
from numba_atomflow.ops.cuda.persistent.staging import NormWeight, sync_consumers
from numba_atomflow.ops.cuda.persistent.trace import BEGUN, DONE, STAGED, make_record_clocks, make_timestamp
from numba_atomflow.ops.cuda.persistent.wide_attention import make_attend_columns
from numba_atomflow.ops.cuda.persistent.wide_epilogue import make_epilogue, make_load_ahead
from numba_atomflow.ops.cuda.persistent.wide_groups import ColumnsIo, LayerPast
from numba_atomflow.ops.cuda.persistent.wide_projection import ColumnsState, make_project_columns
from numba_atomflow.ops.cuda.persistent.wide_staging import make_stage_columns
from numba_atomflow.ops.cuda.persistent.wide_vectors import LayerVectors, make_clear_layer
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, NUMBER, U16, U32, U64, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32, u32
from numba_atomflow.ops.cuda.token.embedding import make_quad
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, NON_FINITE_KEY, make_warp_max_key, token_id


class WideArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        weights, table, cache16, cache, cosines, sines, fault, timestamps, kv_stride, first_op, end_op: as in
            `PersistentArguments`.
        mailbox: [shape.mailbox.end] words, of this kernel alone; zero before the first step.
        vectors: [2, layers, shape.vector_words] words, of this kernel alone; `ABSENT` before the first step.
        steps: [2]; as in `PersistentArguments`, of this kernel alone.
        tokens: [columns]. position: [1], of the first of them.
        logits: [columns, V].
        best: [columns], `LOWEST_KEY` before the first step.
        choices: [columns] in pinned host memory: the most likely token after each column, as `post_token` posts token
            number 1.
    """

    weights: U32
    table: I64
    cache16: U16
    cache: U32
    mailbox: U64
    vectors: U32
    tokens: I32
    position: I64
    steps: I64
    cosines: F32
    sines: F32
    logits: F32
    best: I64
    choices: U64
    fault: I32
    timestamps: I64
    kv_stride: NUMBER
    first_op: NUMBER
    end_op: NUMBER


def make_wide(shape: PersistentShape) -> Any:
    """Kernel (`WideArguments`, or with `shape.rank` `RankWideArguments`)."""
    return make_frame(shape, _make_consume(shape))


def _make_consume(shape: PersistentShape) -> Any:
    """Device function (io, shared, thread): a step of the consumer warps, op by op.

    Arguments: io, `WideArguments`; shared, `SharedMemory`.
    """
    layers, ops, ctas, columns = shape.layers, shape.ops, shape.sms, shape.columns
    table_start, rope_start, half = shape.table_start, shape.rope_start, shape.head_dim // 2
    first_work_tile, kind_of = make_first_work_tile(ctas), make_kind_of(shape)
    work_tiles_of, advance_of = shape.by_kind(lambda plan: plan.work_tiles), shape.by_kind(shape.schedule_advance)
    load_ahead, heads_of = make_load_ahead(shape), make_heads_of(shape)
    project = make_project_columns(shape, load_ahead, make_epilogue(shape, load_ahead))
    timestamp, record_clocks = make_timestamp(shape), make_record_clocks(shape)
    attend, stage = make_attend_columns(shape, timestamp), make_stage_columns(shape)
    clear_layer, vector_words, step_words = make_clear_layer(shape), shape.vector_words, layers * shape.vector_words
    parts = _one_gpu(shape) if shape.rank is None else wide_rank.make_parts(shape)
    mailbox_of, vectors_of, logits_of = parts.mailbox_of, parts.vectors_of, parts.logits_of
    embed, reduce_best, end_step, patience = parts.embed, _make_reduce_best(shape), parts.end_step, parts.patience

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
        epoch, position = u32(io.steps[0] * (layers + 1) + 1), io.position[0]
        own_vectors = i32(step_words if io.steps[0] & 1 else 0)
        entry = thread
        while entry < columns * half:
            column, i = entry // half, entry % half
            floats[rope_start + 2 * column * half + i] = io.cosines[position * half + entry]
            floats[rope_start + (2 * column + 1) * half + i] = io.sines[position * half + entry]
            entry += CONSUMER_THREADS
        embed(io, words, epoch, thread)

        offset, work_tile = i32(0), i32(0)
        for op in range(1, ops):
            kind, layer = kind_of(op), layer_of(op)
            input_flag = u32(epoch + u32(layer))
            flag = u32(input_flag + u32(1))
            vectors = LayerVectors(vectors_of(io), i32(own_vectors + layer * vector_words))
            keys_start = 2 * layer * io.kv_stride
            values_start = keys_start + io.kv_stride
            if kind == ATTENTION:
                if tracing:
                    timestamp(timestamps, op, BEGUN)
                past = LayerPast(io.cache, keys_start // 2, values_start // 2, i32(position))
                heads = heads_of(io, words, layer, position, op)
                attend(ColumnsIo(mailbox, vectors, timestamps, op, flag, watchdog, heads), past, thread, shared)
                if tracing:
                    timestamp(timestamps, op, DONE)
                clear_layer(io.vectors, i32(step_words - own_vectors + layer * vector_words), thread)
                continue
            work_tile = first_work_tile(offset)
            offset = (offset + advance_of(kind)) % i32(ctas)
            if work_tile < work_tiles_of(kind):
                if tracing:
                    timestamp(timestamps, op, BEGUN)
                norm = NormWeight(io.weights, int64(words[table_start + 2 * op + 1]) * TABLE_UNIT)
                stage(kind, work_tile, mailbox, vectors, input_flag, flag, norm, thread, shared, watchdog)
                if tracing:
                    timestamp(timestamps, op, STAGED)
                state = ColumnsState(
                    *(mailbox, vectors, io.cache16, logits_of(io), timestamps, op, kind, input_flag, flag, position),
                    *(keys_start, values_start, best, watchdog),
                )
                project(state, work_tile, thread, shared, progress)
                if tracing:
                    timestamp(timestamps, op, DONE)
        if tracing:
            record_clocks(timestamps, 1)
        if work_tile < work_tiles_of(LM_HEAD):
            reduce_best(best[0], shared.keys, io, thread)
        sync_consumers()
        if thread == 0:
            end_step(io, epoch, watchdog)

    return consume


def _one_gpu(shape: PersistentShape) -> wide_rank.WideParts:
    @ptx.device_function
    def mailbox_of(io):
        return io.mailbox

    @ptx.device_function
    def vectors_of(io):
        return io.vectors

    @ptx.device_function
    def logits_of(io):
        return io.logits

    return wide_rank.WideParts(mailbox_of, vectors_of, logits_of, _make_embed(shape), _make_end_step(shape), 1)


def _make_embed(shape: PersistentShape) -> Any:
    """As in `WideParts`."""
    quads, columns, hidden, table_start = shape.hidden // 4, shape.columns, shape.hidden, shape.table_start
    pairs, exact = shape.mailbox.residual_in, shape.mailbox.residual_in_exact
    look_up = make_quad(shape.embedding)

    @ptx.large_device_function
    def embed(io, words, epoch, thread):
        mailbox = io.mailbox
        entry = i32(cuda.blockIdx.x) * CONSUMER_THREADS + thread
        while entry < columns * quads:
            column = entry // quads
            quad = entry - column * quads
            row_start = int64(words[table_start]) * TABLE_UNIT
            x0, x1, x2, x3 = look_up(io.weights, row_start, int64(io.tokens[column]), int64(quad))
            index = column * hidden + quad * 4
            ll_store_pair(mailbox, pairs + index // 2, x0, x1, epoch)
            ll_store_pair(mailbox, pairs + index // 2 + 1, x2, x3, epoch)
            ptx.ll_store(mailbox, exact + index, ptx.f32_bits(x0), epoch)
            ptx.ll_store(mailbox, exact + index + 1, ptx.f32_bits(x1), epoch)
            ptx.ll_store(mailbox, exact + index + 2, ptx.f32_bits(x2), epoch)
            ptx.ll_store(mailbox, exact + index + 3, ptx.f32_bits(x3), epoch)
            entry += i32(cuda.gridDim.x) * CONSUMER_THREADS

    return embed


def _make_reduce_best(shape: PersistentShape) -> Any:
    """Device function (key, keys, io, thread): the largest of the CTA's sort keys of each column goes into `best`. A
    thread's logits are all of one column.
    """
    columns, start = shape.columns, shape.partials_start // 2
    largest_of_column = make_warp_max_key(columns)

    @ptx.device_function
    def reduce_best(key, keys, io, thread):
        largest = largest_of_column(key)
        sync_consumers()
        if thread & 31 < columns:
            keys[start + (thread >> 5) * columns + (thread & 31)] = largest
        sync_consumers()
        if thread < columns:
            for warp in range(CONSUMER_WARPS):
                largest = max(largest, keys[start + warp * columns + thread])
            # The results of a CTA whose watchdog tripped are wrong: the token gets the key of a NaN logit.
            cuda.atomic.max(io.best, thread, largest if io.fault[0] == 0 else int64(NAN_KEY))

    return reduce_best


def _make_end_step(shape: PersistentShape) -> Any:
    """As in `WideParts`."""
    ctas, columns = shape.sms, shape.columns

    @ptx.device_function
    def end_step(io, epoch, watchdog):
        steps, choices = io.steps, io.choices
        cuda.threadfence()  # the CTA's largest keys are in `best` before the CTA is counted
        if cuda.atomic.add(steps, 1, 1) == ctas - 1:
            steps[0] += 1
            steps[1] = 0
            cuda.threadfence()  # this CTA was counted last: the keys of the others are in `best`
            for column in range(columns):
                largest = cuda.atomic.exch(io.best, column, int64(LOWEST_KEY))
                non_finite = int64(1) if largest >= NON_FINITE_KEY else int64(0)
                choices[column] = np.uint64(int64(1) << 32 | non_finite << 31 | token_id(largest))
            cuda.threadfence_system()

    return end_step


def wide_kernel(shape: PersistentShape) -> Planned:
    """The kernel of `make_wide`."""
    name = f"{'persistent' if shape.rank is None else 'persistent_rank'}_x{shape.columns}"
    signature = WideArguments if shape.rank is None else wide_rank.RankWideArguments
    spec = kernel_spec(name, make_wide, signature, CTA_THREADS, shape.dynamic_shared_bytes, shape=shape)
    return Planned(replace(spec, cooperative=True), shape.sms)
