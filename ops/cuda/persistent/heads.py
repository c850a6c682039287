"""q, k and v of models with a bias or with norms of heads (Qwen2, Qwen3), finished by attention.

The norm of a head needs all of its elements, and a work tile of the QKV projection has 16. So the projection publishes
its sums as they are, and who reads a head in attention finishes it: bias, norm, RoPE. A warp takes a head; a lane has
elements 2 l and 2 l + 1 of its first half, and the two that RoPE rotates with them. The token's key and value are also
stored, by the CTA of each KV head that has the first split.

Rounding: all in float32, as in `token/rope.py`, and once to float16 at the end. Every reader of a head computes the
same bits.
Cost: twice the bytes of float16 pairs, from L2; a sum over a warp and a square root in the chain from QKV to attention.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int64, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.comm.exchange import make_exchange
from numba_atomflow.ops.cuda.comm.flagged import watchdog_trips
from numba_atomflow.ops.cuda.gemv.epilogue import rope_pair
from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_WARPS, HEAD_VECTORS, TABLE_UNIT, PersistentShape
from numba_atomflow.ops.cuda.scalars import i32, u32

_MOST_ROWS = 3  # heads of a warp whose loads are issued together: with more, registers would not be enough
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Heads(NamedTuple):
    """What finishing a layer's heads reads and writes beside the mailbox.

    Attributes:
        weights: all weights of the model, 32-bit words.
        bias, q_norm, k_norm: words at which the layer's begin; of what the model does not have, any.
        q, cache16: as in `PersistentArguments`; q is None in the kernel for several columns, which does not write it.
        keys_start, values_start: elements of `cache16` at which those of the first column's position begin.
        finished: the launch begins with this op, so that the words are the views that it reads, finished before.
    """

    weights: Any
    bias: Any
    q_norm: Any
    k_norm: Any
    q: Any
    cache16: Any
    keys_start: Any
    values_start: Any
    finished: Any


def make_heads_of(shape: PersistentShape) -> Any:
    """Device function (io, words, layer, position, op) -> the layer's `Heads`; 0 where the epilogue of the projection
    finishes them.

    Arguments: io, the kernel's parameter; words, of shared memory; position, of the first column.
    """
    vectors_start, kv_width = shape.table_start + 2 * shape.ops, shape.kv_heads * shape.head_dim

    @ptx.device_function
    def nothing(io, words, layer, position, op):
        return i32(0)

    @ptx.device_function
    def vector(words, layer, number):
        return int64(words[vectors_start + HEAD_VECTORS * layer + number]) * TABLE_UNIT

    @ptx.device_function
    def q_of(io):
        return io.q

    @ptx.device_function
    def no_q(io):
        return None

    q_view = q_of if shape.columns == 1 else no_q

    @ptx.device_function
    def heads_of(io, words, layer, position, op):
        keys_start = 2 * layer * io.kv_stride + position * kv_width
        return Heads(
            *(io.weights, vector(words, layer, 0), vector(words, layer, 1), vector(words, layer, 2), q_view(io)),
            *(io.cache16, keys_start, keys_start + io.kv_stride, io.first_op == op),
        )

    return heads_of if shape.rope_in_attention else nothing


def make_receive_heads(shape: PersistentShape, token_start: int) -> Any:
    """Device function (io, kv_head, first, count, with_keys, stores, thread, shared): q of the KV head's query heads,
    of `count` columns from `first` on, and `with_keys` the keys and values of all columns, from the mailbox to shared
    memory, finished.

    Arguments: io, with `mailbox`, `flag`, `watchdog` and `heads`; stores, the keys and values go to the cache, too, and
    with one column q to its view.

    Args:
        token_start: word of shared memory at which the first column's key begins; its value follows, then the next.
    """
    head_dim, query_group, heads, kv_heads = shape.head_dim, shape.query_group, shape.heads, shape.kv_heads
    half, pairs, pitch, x_start = head_dim // 2, head_dim // 4, shape.query_pitch, shape.x_start
    q_start, width, kv_rows = shape.mailbox.q, shape.qkv.out_features, 2 * shape.columns
    warp_rows = -(-(shape.attention_columns * query_group + kv_rows) // CONSUMER_WARPS)
    rows = -(-warp_rows // -(-warp_rows // _MOST_ROWS))  # of a warp at once: as many each time
    registers, vector_registers, step = 8 * rows, 4 * rows, rows * CONSUMER_WARPS
    load, load_vectors, finish, store = (
        make_exchange(shape.ranks).load_own,
        _make_load_vectors(shape),
        _make_finish(shape),
        _make_store(shape),
    )

    @ptx.device_function
    def place(kv_head, first, q_rows, row):
        """Column of a row, its head among those of q, k and v, and the word of shared memory that it goes to."""
        if row < q_rows:
            column = i32(u32(row) // u32(query_group))
            head = i32(kv_head * query_group + row - column * query_group)
            return i32(first + column), head, i32(x_start + row * pitch)
        other = i32(row - q_rows)
        head = i32(heads + (other & 1) * kv_heads + kv_head)
        return i32(other >> 1), head, i32(token_start + other * half)

    @ptx.large_device_function
    def receive_heads(io, kv_head, first, count, with_keys, stores, thread, shared):
        received = cuda.local.array(registers, uint32)
        bias = cuda.local.array(vector_registers, float32)
        gains = cuda.local.array(vector_registers, float32)
        mailbox, flag, words = io.mailbox, io.flag, shared.words
        lane = i32(thread & 31)
        pair = min(lane, i32(pairs - 1))
        q_rows = i32(count * query_group)
        last = i32(q_rows + (kv_rows if with_keys else 0) - 1)
        start = i32(thread >> 5)
        while start <= last:
            for i in range(rows):
                _, head, _ = place(kv_head, first, q_rows, min(i32(start + i * CONSUMER_WARPS), last))
                load_vectors(io.heads, head, pair, bias, gains, 4 * i)
            polls, waiting = u32(0), True
            while waiting:
                waiting = False
                for i in range(rows):
                    column, head, _ = place(kv_head, first, q_rows, min(i32(start + i * CONSUMER_WARPS), last))
                    index = i32(q_start + column * width + head * head_dim + 2 * pair)
                    w0, w1, w2, w3 = load(mailbox, index)
                    received[8 * i], received[8 * i + 1], received[8 * i + 2], received[8 * i + 3] = w0, w1, w2, w3
                    w0, w1, w2, w3 = load(mailbox, index + half)
                    received[8 * i + 4], received[8 * i + 5], received[8 * i + 6], received[8 * i + 7] = w0, w1, w2, w3
                for i in range(4 * rows):
                    if received[2 * i + 1] != flag:
                        waiting = True
                polls = u32(polls + u32(1))
                if waiting and watchdog_trips(io.watchdog, polls):
                    waiting = False
            for i in range(rows):
                row = i32(start + i * CONSUMER_WARPS)
                if row <= last:
                    column, head, target = place(kv_head, first, q_rows, row)
                    low, high = finish(io.heads, head, column, lane, received, bias, gains, i, shared.floats)
                    if lane < pairs:
                        words[target + lane], words[target + pairs + lane] = low, high
                        if stores:
                            store(io.heads, head, column, lane, low, high)
            start = i32(start + step)

    return receive_heads


def _make_load_vectors(shape: PersistentShape) -> Any:
    """Device function (heads, head, pair, bias, gains, at): a lane's four elements of a head's bias and norm weight."""
    head_dim, half, query_heads = shape.head_dim, shape.head_dim // 2, shape.heads

    @ptx.device_function
    def load(weights, start, out, at):
        out[at], out[at + 1] = ptx.load_f32x2(weights, start)
        out[at + 2], out[at + 3] = ptx.load_f32x2(weights, start + half)

    @ptx.device_function
    def nothing(heads, head, pair, out, at):
        """The model has no such vector."""

    @ptx.device_function
    def load_bias(heads, head, pair, out, at):
        load(heads.weights, heads.bias + i32(head * head_dim + 2 * pair), out, at)

    @ptx.device_function
    def load_gains(heads, head, pair, out, at):
        load(heads.weights, (heads.q_norm if head < query_heads else heads.k_norm) + 2 * pair, out, at)

    of_bias = load_bias if shape.qkv_bias else nothing
    of_gains = load_gains if shape.qk_norm else nothing

    @ptx.device_function
    def load_vectors(heads, head, pair, bias, gains, at):
        of_bias(heads, head, pair, bias, at)
        of_gains(heads, head, pair, gains, at)

    return load_vectors


def _make_finish(shape: PersistentShape) -> Any:
    """Device function (heads, head, column, lane, received, bias, gains, i, floats) -> a lane's elements 2 l and
    2 l + 1 of a head's first half, and those of its second half, as pairs of float16; a lane without elements has any.

    Arguments: i, which of the rows in `received`, `bias` and `gains`.
    """
    head_dim, half, pairs, rope_start = shape.head_dim, shape.head_dim // 2, shape.head_dim // 4, shape.rope_start
    rotated_heads = shape.heads + shape.kv_heads
    inverse_width, epsilon = np.float32(1.0 / head_dim), np.float32(shape.eps)

    @ptx.device_function
    def add(a, b, c, d, bias, at):
        return a + bias[at], b + bias[at + 1], c + bias[at + 2], d + bias[at + 3]

    @ptx.device_function
    def norm(a, b, c, d, gains, at, lane):
        squares = ptx.warp_sum((a * a + b * b) + (c * c + d * d) if lane < pairs else _ZERO)
        factor = _ONE / np.float32(math.sqrt(squares * inverse_width + epsilon))
        a, b = a * (factor * gains[at]), b * (factor * gains[at + 1])
        return a, b, c * (factor * gains[at + 2]), d * (factor * gains[at + 3])

    @ptx.device_function
    def without_bias(a, b, c, d, bias, at):
        return a, b, c, d

    @ptx.device_function
    def without_norm(a, b, c, d, gains, at, lane):
        return a, b, c, d

    add_bias = add if shape.qkv_bias else without_bias
    norm_head = norm if shape.qk_norm else without_norm

    @ptx.device_function
    def finish(heads, head, column, lane, received, bias, gains, i, floats):
        a, b = ptx.bits_f32(received[8 * i]), ptx.bits_f32(received[8 * i + 2])
        c, d = ptx.bits_f32(received[8 * i + 4]), ptx.bits_f32(received[8 * i + 6])
        if not heads.finished:
            a, b, c, d = add_bias(a, b, c, d, bias, 4 * i)
            if head < rotated_heads:
                a, b, c, d = norm_head(a, b, c, d, gains, 4 * i, lane)
                table = i32(rope_start + column * head_dim + 2 * min(lane, i32(pairs - 1)))
                a, c = rope_pair(a, c, floats[table], floats[table + half])
                b, d = rope_pair(b, d, floats[table + 1], floats[table + half + 1])
        return ptx.pack_f16x2(a, b), ptx.pack_f16x2(c, d)

    return finish


def _make_store(shape: PersistentShape) -> Any:
    """Device function (heads, head, column, lane, low, high): a lane's part of a finished head, to the cache or to the
    view of q.
    """
    head_dim, half, query_heads, kv_heads = shape.head_dim, shape.head_dim // 2, shape.heads, shape.kv_heads
    kv_width = kv_heads * head_dim

    @ptx.device_function
    def scatter(halves, start, low, high):
        halves[start], halves[start + 1] = np.uint16(low & u32(0xFFFF)), np.uint16(low >> u32(16))
        halves[start + half], halves[start + half + 1] = np.uint16(high & u32(0xFFFF)), np.uint16(high >> u32(16))

    @ptx.device_function
    def store_q(heads, start, low, high):
        scatter(heads.q, start, low, high)

    @ptx.device_function
    def no_view(heads, start, low, high):
        """Several columns have none."""

    store_query = store_q if shape.columns == 1 else no_view

    @ptx.device_function
    def store(heads, head, column, lane, low, high):
        if head < query_heads:
            store_query(heads, head * head_dim + 2 * lane, low, high)
        else:
            is_key = head < query_heads + kv_heads
            kv_head = head - query_heads if is_key else head - query_heads - kv_heads
            start = heads.keys_start if is_key else heads.values_start
            scatter(heads.cache16, start + column * kv_width + kv_head * head_dim + 2 * lane, low, high)

    return store
