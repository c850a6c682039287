"""A step of several tokens on one of several GPUs (a rank): its parameter, how the step begins and how it ends.

It is as in `rank.py`, with everything for each column: the rank that has a token's row of the embedding sends it to
all, and the CTA of a rank that is done last exchanges a sort key for each column. Every rank then posts the same
tokens, and all have all logits. The inputs of `o` and `down` go to all ranks without flags: `wide_vectors.py` says why
their memory is ready for that.

Cost model: one exchange more than on one GPU, in which the keys of all columns are polled together; 4 * V bytes of
logits for each column over each link, while the LM head's weights stream.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import cuda, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import RankArrays, make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.rank import PATIENCE, logits_of, mailboxes_of
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_THREADS, TABLE_UNIT, PersistentShape
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, NUMBER, U16, U32, U64
from numba_atomflow.ops.cuda.scalars import i32, u32
from numba_atomflow.ops.cuda.token.embedding import make_quad
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, NON_FINITE_KEY, token_id


class RankWideArguments(NamedTuple):
    """The kernel's parameter. Fields are those of `WideArguments` but these:

    Attributes:
        cache16, cache: of the rank's KV heads. logits: [columns, V], of all ranks.
        vectors: of all ranks, in the rank's own memory.
        rank: its number.
        mailbox_1 ..., vectors_1 ..., logits_1 ...: those of the other ranks, in any order.
        advance: how far the position moves when the step has ended: 0 for a step that verifies.
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
    mailbox_1: U64
    mailbox_2: U64
    mailbox_3: U64
    mailbox_4: U64
    mailbox_5: U64
    mailbox_6: U64
    mailbox_7: U64
    vectors_1: U32
    vectors_2: U32
    vectors_3: U32
    vectors_4: U32
    vectors_5: U32
    vectors_6: U32
    vectors_7: U32
    logits_1: F32
    logits_2: F32
    logits_3: F32
    logits_4: F32
    logits_5: F32
    logits_6: F32
    logits_7: F32
    kv_stride: NUMBER
    first_op: NUMBER
    end_op: NUMBER
    rank: NUMBER
    advance: NUMBER


class WideParts(NamedTuple):
    """What is different in a step of several tokens of one GPU and in a rank's.

    Attributes:
        mailbox_of, vectors_of, logits_of: device functions (io) -> what `comm/exchange.py` takes of them.
        embed: device function (io, words, epoch, thread): the tokens' rows of the embedding, to the mailbox.
        end_step: device function (io, epoch, watchdog): a CTA has completed its step; the last one to do so counts it
            and posts the tokens.
        patience: times as many polls as `SPIN_LIMIT` before the watchdog trips.
    """

    mailbox_of: Any
    vectors_of: Any
    logits_of: Any
    embed: Any
    end_step: Any
    patience: int


def make_parts(shape: PersistentShape) -> WideParts:
    """Those of a rank."""
    return WideParts(mailboxes_of, _vectors_of, logits_of, _make_embed(shape), _make_end_step(shape), PATIENCE)


@ptx.device_function
def _vectors_of(io):
    return RankArrays(
        *(io.rank, io.vectors, io.vectors_1, io.vectors_2, io.vectors_3),
        *(io.vectors_4, io.vectors_5, io.vectors_6, io.vectors_7),
    )


def _make_embed(shape: PersistentShape) -> Any:
    """As in `WideParts`: of each column the rank that has the token's row sends it to every rank."""
    quads, columns, hidden, table_start = shape.hidden // 4, shape.columns, shape.hidden, shape.table_start
    pairs, exact, rows = shape.mailbox.residual_in, shape.mailbox.residual_in_exact, shape.embedding.out_features
    look_up, exchange = make_quad(shape.embedding), make_exchange(shape.ranks)
    store, store_pair = exchange.store, exchange.store_pair

    @ptx.large_device_function
    def embed(io, words, epoch, thread):
        mailbox, row_start = mailboxes_of(io), int64(words[table_start]) * TABLE_UNIT
        entry = i32(cuda.blockIdx.x) * CONSUMER_THREADS + thread
        while entry < columns * quads:
            column = entry // quads
            quad = entry - column * quads
            row = int64(io.tokens[column]) - mailbox.rank * rows
            if 0 <= row < rows:
                x0, x1, x2, x3 = look_up(io.weights, row_start, row, int64(quad))
                index = column * hidden + quad * 4
                store_pair(mailbox, pairs + index // 2, x0, x1, epoch)
                store_pair(mailbox, pairs + index // 2 + 1, x2, x3, epoch)
                store(mailbox, exact + index, ptx.f32_bits(x0), epoch)
                store(mailbox, exact + index + 1, ptx.f32_bits(x1), epoch)
                store(mailbox, exact + index + 2, ptx.f32_bits(x2), epoch)
                store(mailbox, exact + index + 3, ptx.f32_bits(x3), epoch)
            entry += i32(cuda.gridDim.x) * CONSUMER_THREADS

    return embed


def _make_end_step(shape: PersistentShape) -> Any:
    """As in `WideParts`: the CTA of the rank that is done last waits for the other ranks, and posts what all of them
    have chosen.
    """
    ctas, columns, exchange_keys = shape.sms, shape.columns, _make_exchange_keys(shape)

    @ptx.large_device_function
    def end_step(io, epoch, watchdog):
        largest = cuda.local.array(columns, int64)
        steps, position, choices = io.steps, io.position, io.choices
        cuda.threadfence_system()  # what the CTA wrote, here and on peers, comes before it is counted
        if cuda.atomic.add(steps, 1, 1) == ctas - 1:
            cuda.threadfence_system()
            exchange_keys(io, mailboxes_of(io), epoch, watchdog, largest)
            cuda.threadfence_system()
            steps[0] += 1
            steps[1] = 0
            position[0] += io.advance
            for column in range(columns):
                key = largest[column] if io.fault[0] == 0 else int64(NAN_KEY)
                non_finite = int64(1) if key >= NON_FINITE_KEY else int64(0)
                choices[column] = np.uint64(int64(1) << 32 | non_finite << 31 | token_id(key))
            cuda.threadfence_system()

    return end_step


def _make_exchange_keys(shape: PersistentShape) -> Any:
    """Device function (io, mailbox, epoch, watchdog, largest): of each column the largest sort key of all ranks, into
    int64 [columns]; that of NaN if a watchdog tripped on any of them.
    """
    ranks, columns, start, exchange = shape.ranks, shape.columns, shape.mailbox.best_keys, make_exchange(shape.ranks)
    load, store = exchange.load, exchange.store
    registers = 4 * columns

    @ptx.large_device_function
    def exchange_keys(io, mailbox, epoch, watchdog, largest):
        received = cuda.local.array(registers, uint32)
        for column in range(columns):
            own = cuda.atomic.exch(io.best, column, int64(LOWEST_KEY))
            key = int64(own) if io.fault[0] == 0 else int64(NAN_KEY)
            place = start + 2 * (mailbox.rank * columns + column)
            store(mailbox, place, u32(key & 0xFFFFFFFF), epoch)
            store(mailbox, place + 1, u32(key >> 32 & 0xFFFFFFFF), epoch)
            largest[column] = key
        for other in range(ranks):
            polls, waiting = u32(0), True
            while waiting:
                for column in range(columns):
                    low, low_flag, high, high_flag = load(mailbox, start + 2 * (other * columns + column))
                    received[4 * column], received[4 * column + 1] = low, low_flag
                    received[4 * column + 2], received[4 * column + 3] = high, high_flag
                waiting = False
                for column in range(columns):
                    if received[4 * column + 1] != epoch or received[4 * column + 3] != epoch:
                        waiting = True
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(watchdog, polls):
                    waiting = False
            for column in range(columns):
                key = int64(received[4 * column + 2]) << 32 | int64(received[4 * column])
                largest[column] = max(largest[column], key)

    return exchange_keys
