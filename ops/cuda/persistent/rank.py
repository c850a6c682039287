"""A step of the persistent kernel on one of several GPUs (a rank): its parameter, how the step begins and how it ends.

The embedding's rows are divided as those of the LM head are: the rank that has the token's row sends it to all. Logits
go to every rank, so that all of them sample the same token by themselves. The step ends when every rank has ended: the
CTA of a rank that is done last exchanges sort keys with the others, whose maximum is the arg-max. Until then no rank
may begin the next step; then the words of this one are not read any more. `cuda.threadfence_system` on both sides
orders all accesses of the step, plain ones to the peers' logits too.

Cost model: one exchange more than with one GPU, and 4 * V bytes over each link, while the LM head's weights stream.
"""

from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import MAX_PEERS, RankArrays, make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_THREADS, LM_HEAD, TABLE_UNIT, PersistentShape
from numba_atomflow.ops.cuda.persistent.staging import sync_consumers
from numba_atomflow.ops.cuda.runtime.spec import F32, F64, I32, I64, NUMBER, U16, U32, U64
from numba_atomflow.ops.cuda.scalars import i32, u32
from numba_atomflow.ops.cuda.token.advance import post_token
from numba_atomflow.ops.cuda.token.embedding import make_quad
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY, NAN_KEY, token_id

PATIENCE = 4  # times as many polls as on one GPU before the watchdog trips: launches of ranks may be far apart
# How a launch ends (`RankArguments.ending`): with no exchange, for the LM head by itself; the step ends, and leaves the
# arg-max to kernels that choose the token; the most likely token is taken; a prompt's token is done.
APART, SAMPLED, GREEDY, PROMPT = range(4)


class RankArguments(NamedTuple):
    """The kernel's parameter. Fields are those of `PersistentArguments` but these:

    Attributes:
        cache16, cache: of the rank's KV heads. q, attn_out, intermediate: the rank's part.
        residual: the rank's rows, at their places. logits: [V], of all ranks.
        rank: its number.
        mailbox_1 ..., logits_1 ...: mailboxes and logits of the other ranks, in any order.
        steps_back: 1 to run the LM head of the step that was completed last, else 0.
        ending: `APART`, `SAMPLED`, `GREEDY` or `PROMPT`.
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
    mailbox_1: U64
    mailbox_2: U64
    mailbox_3: U64
    mailbox_4: U64
    mailbox_5: U64
    mailbox_6: U64
    mailbox_7: U64
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
    steps_back: NUMBER
    ending: NUMBER


def peers_of(name: str, others: list[Any], own: Any) -> dict[str, Any]:
    """The fields of `RankArguments` for an array of the other ranks; those beyond them are not used."""
    return {f"{name}_{i + 1}": others[i] if i < len(others) else own for i in range(MAX_PEERS)}


class Parts(NamedTuple):
    """What is different in a step of one GPU and in a rank's.

    Attributes:
        mailbox_of: device function (io) -> what `comm/exchange.py` takes as words. logits_of: the same for logits.
        epoch_of: device function (io) -> epoch of the embedding's words; the results of layer i have that + i + 1.
        embed: device function (io, words, epoch, thread): the token's row of the embedding, to the mailbox.
        end: device function (io, epoch, work_tile, best, keys, thread, watchdog): the CTA has done its ops. work_tile:
            its first of the LM head, if it has one; best: int64 [1], the largest sort key of the thread's logits; keys:
            view of shared memory.
        patience: times as many polls as `SPIN_LIMIT` before the watchdog trips.
    """

    mailbox_of: Any
    logits_of: Any
    epoch_of: Any
    embed: Any
    end: Any
    patience: int


def make_parts(shape: PersistentShape, reduce_best: Any) -> Parts:
    """Those of a rank.

    Args:
        reduce_best: device function (key, keys, io, thread): the CTA's largest key goes into `best`.
    """
    layers = shape.layers

    @ptx.device_function
    def epoch_of(io):
        return u32((io.steps[0] - io.steps_back) * (layers + 1) + 1)

    return Parts(mailboxes_of, logits_of, epoch_of, _make_embed(shape), _make_end(shape, reduce_best), PATIENCE)


@ptx.device_function
def mailboxes_of(io):
    """The mailboxes of all ranks, of any kernel's parameter that has them by these names."""
    return RankArrays(
        *(io.rank, io.mailbox, io.mailbox_1, io.mailbox_2, io.mailbox_3),
        *(io.mailbox_4, io.mailbox_5, io.mailbox_6, io.mailbox_7),
    )


@ptx.device_function
def logits_of(io):
    """The logits of all ranks, likewise."""
    return RankArrays(
        *(io.rank, io.logits, io.logits_1, io.logits_2, io.logits_3),
        *(io.logits_4, io.logits_5, io.logits_6, io.logits_7),
    )


def _make_embed(shape: PersistentShape) -> Any:
    """As in `Parts`: the rank that has the token's row sends it to every rank."""
    quads, rows, table_start = shape.hidden // 4, shape.embedding.out_features, shape.table_start
    pairs, exact = shape.mailbox.residual_in, shape.mailbox.residual_in_exact
    look_up, exchange = make_quad(shape.embedding), make_exchange(shape.ranks)
    store, store_pair = exchange.store, exchange.store_pair

    @ptx.large_device_function
    def embed(io, words, epoch, thread):
        mailbox, residual, row_start = mailboxes_of(io), io.residual, int64(words[table_start]) * TABLE_UNIT
        row = int64(io.tokens[0]) - mailbox.rank * rows
        quad = i32(cuda.blockIdx.x) * CONSUMER_THREADS + thread
        while 0 <= row < rows and quad < quads:
            x0, x1, x2, x3 = look_up(io.weights, row_start, row, int64(quad))
            index = quad * 4
            store_pair(mailbox, pairs + index // 2, x0, x1, epoch)
            store_pair(mailbox, pairs + index // 2 + 1, x2, x3, epoch)
            store(mailbox, exact + index, ptx.f32_bits(x0), epoch)
            store(mailbox, exact + index + 1, ptx.f32_bits(x1), epoch)
            store(mailbox, exact + index + 2, ptx.f32_bits(x2), epoch)
            store(mailbox, exact + index + 3, ptx.f32_bits(x3), epoch)
            residual[index], residual[index + 1], residual[index + 2], residual[index + 3] = x0, x1, x2, x3
            quad += i32(cuda.gridDim.x) * CONSUMER_THREADS

    return embed


def _make_end(shape: PersistentShape, reduce_best: Any) -> Any:
    """As in `Parts`."""
    ops, work_tiles, end_step = shape.ops, shape.plans[LM_HEAD].work_tiles, _make_end_step(shape)

    @ptx.device_function
    def end(io, epoch, work_tile, best, keys, thread, watchdog):
        if io.ending != APART:
            if io.end_op == ops and work_tile < work_tiles:
                reduce_best(best[0], keys, io, thread)
            sync_consumers()
            if thread == 0:
                end_step(io, mailboxes_of(io), epoch, watchdog)

    return end


def _make_end_step(shape: PersistentShape) -> Any:
    """Device function (io, mailbox, epoch, watchdog): the CTA of the rank that is done last waits for the other ranks,
    and writes what all have read.
    """
    ctas, await_keys = shape.sms, _make_exchange_keys(shape)

    @ptx.large_device_function
    def end_step(io, mailbox, epoch, watchdog):
        steps, position = io.steps, io.position
        cuda.threadfence_system()  # what the CTA wrote, here and on peers, comes before it is counted
        if cuda.atomic.add(steps, 1, 1) == ctas - 1:
            cuda.threadfence_system()
            largest = await_keys(io, mailbox, epoch, watchdog)
            cuda.threadfence_system()
            steps[0] += 1
            steps[1] = 0
            if io.ending == SAMPLED:
                io.best[0] = largest
            else:
                position[0] += 1
            if io.ending == GREEDY:
                token = token_id(largest)
                io.tokens[0] = i32(token)
                post_token(token, largest, io.seen, io.token_ring, len(io.token_ring), io.tokens_posted)

    return end_step


def _make_exchange_keys(shape: PersistentShape) -> Any:
    """Device function (io, mailbox, epoch, watchdog) -> the largest sort key of all ranks; that of NaN if a watchdog
    tripped on any of them.
    """
    ranks, start, exchange = shape.ranks, shape.mailbox.best_keys, make_exchange(shape.ranks)
    load, store = exchange.load, exchange.store

    @ptx.large_device_function
    def exchange_keys(io, mailbox, epoch, watchdog):
        own = cuda.atomic.exch(io.best, 0, int64(LOWEST_KEY))
        largest = int64(own) if io.fault[0] == 0 else int64(NAN_KEY)
        place = start + 2 * mailbox.rank
        store(mailbox, place, u32(largest & 0xFFFFFFFF), epoch)
        store(mailbox, place + 1, u32(largest >> 32 & 0xFFFFFFFF), epoch)
        for other in range(ranks):
            polls, waiting = u32(0), True
            while waiting:
                low, low_flag, high, high_flag = load(mailbox, start + 2 * other)
                waiting = low_flag != epoch or high_flag != epoch
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(watchdog, polls):
                    waiting = False
            largest = max(largest, int64(high) << 32 | int64(low))
        return largest if io.fault[0] == 0 else int64(NAN_KEY)

    return exchange_keys
