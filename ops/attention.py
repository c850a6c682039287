"""Grouped-query attention (GQA) over a contiguous KV cache.

One layer's cache is two arrays [positions, kv_heads * head_dim]: the row of a key is its position. Query head h reads
KV head h // ratio. Softmax is computed in float32 with the maximum subtracted.

A sliding window of W positions lets a token at position p see keys p - W + 1 .. p; `NO_WINDOW` lets it see all. A soft
cap c makes c tanh(s / c) of a score s; `NO_CAP` leaves it.

Cost model, few tokens at length S: 8 * S * kv_dim bytes (float32 cache), and a few ns per key, head and token
(ops/simd_attention.py). A prefill chunk of T tokens: 4 * T * S * q_dim
operations in the loops of ops/simd_gemm.py, with the running max and row sum of online softmax (Milakov and Gimelshein,
2018).
"""

import math

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from numba_atomflow.ops.jit import cpu_kernel
from numba_atomflow.ops.simd_attention import add_values, score_keys, softmax_weights
from numba_atomflow.ops.simd_gemm import COLUMNS, multiply_columns, multiply_rows
from numba_atomflow.ops.simd_softmax import LOWEST, softmax_tile

KEY_TILE = 96  # keys of a step of online softmax; a multiple of ROWS
_TOKEN_TILE = 64  # keys of a step of few tokens: those of one head stay in L1
_LOWEST = np.float32(LOWEST)
NO_WINDOW, NO_CAP = 1 << 62, np.float32(0.0)


def chunk_scratch(head_dim: int) -> int:
    """Floats of scratch per thread that `attend_chunk` needs."""
    padded = -(-head_dim // COLUMNS) * COLUMNS
    tile = 0 if head_dim == padded else KEY_TILE * padded
    return (head_dim + KEY_TILE + 2 * padded + 3) * COLUMNS + tile


def attend_reference(
    q: NDArray[np.float64],
    keys: NDArray[np.float64],
    values: NDArray[np.float64],
    position: int,
    head_dim: int,
    window: int = NO_WINDOW,
    soft_cap: float = 0.0,
) -> NDArray[np.float64]:
    """q [T, heads * head_dim] at positions position .. position + T - 1 -> [T, heads * head_dim]."""
    tokens, heads, kv_heads = len(q), q.shape[1] // head_dim, keys.shape[1] // head_dim
    out = np.empty_like(q)
    for t in range(tokens):
        length = position + t + 1
        seen = slice(max(0, length - window), length)
        for h in range(heads):
            kv = slice(h * kv_heads // heads * head_dim, (h * kv_heads // heads + 1) * head_dim)
            head = slice(h * head_dim, (h + 1) * head_dim)
            scores = keys[seen, kv] @ q[t, head] / math.sqrt(head_dim)
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values[seen, kv] / weights.sum()
    return out


@cpu_kernel(inline=True)
def _cap(scores, soft_cap):
    """soft_cap * tanh(score / soft_cap) of each score, in place."""
    for i in range(scores.shape[0]):
        scores[i] = soft_cap * np.float32(math.tanh(scores[i] / soft_cap))


@cpu_kernel()
def attend_tokens(q, keys, values, position, head_dim, window, soft_cap, scores, out):
    """Causal attention of 1 to GEMV_TOKENS tokens at positions position[0] .. position[0] + T - 1.

    A token has the same bits whatever tokens are beside it. A thread has a range of items, a head and a piece of the
    tokens each: as many as `scores` has rows for, or fewer where there are more threads.

    Args:
        q, out: float32 [T, heads * head_dim].
        keys, values: float32 [positions, kv_heads * head_dim]; rows 0 .. position[0] + T - 1 are read.
        position: int64 [1].
        window, soft_cap: int64 and float32, see above.
        scores: float32 [threads, at least T, positions], scratch.
    """
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    pieces = min(tokens, max(2, (scores.shape[0] + heads - 1) // heads))  # of the tokens, for the threads' sake
    items = heads * pieces
    at_once = scores.shape[1] // ((tokens + pieces - 1) // pieces)
    workers = min(items, max(scores.shape[0], (items + at_once - 1) // at_once))
    for worker in prange(workers):
        own = scores[get_thread_id()]
        end = items * (worker + 1) // workers
        for item in range(items * worker // workers, end, at_once):
            last = min(item + at_once, end)
            _attend_items(q, keys, values, position[0], head_dim, window, soft_cap, item, last, pieces, own, out)


@cpu_kernel(inline=True)
def _attend_items(q, keys, values, position, head_dim, window, soft_cap, begin, end, pieces, scores, out):
    """Items begin .. end - 1 of `attend_tokens`, each a head of q and a piece of the tokens.

    All of them read a tile of keys, or of values, before the next one: heads that share a KV head find it in L1.
    """
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    ratio = heads // (keys.shape[1] // head_dim)
    scale = np.float32(1.0 / math.sqrt(head_dim))
    row_token, row_head = np.empty(scores.shape[0], np.int64), np.empty(scores.shape[0], np.int64)
    rows = 0  # of scores: one for each head and token of the items
    for item in range(begin, end):
        h, piece = item // pieces, item % pieces
        for t in range(tokens * piece // pieces, tokens * (piece + 1) // pieces):
            row_token[rows], row_head[rows] = t, h
            rows += 1

    tiles = range(max(0, position + 1 - window) // _TOKEN_TILE * _TOKEN_TILE, position + tokens, _TOKEN_TILE)
    for first in tiles:
        for row in range(rows):
            t, h = row_token[row], row_head[row]
            low = max(first, position + t + 1 - window)
            count = max(0, min(first + _TOKEN_TILE, position + t + 1) - low)
            query, start = q[t, h * head_dim : (h + 1) * head_dim], h // ratio * head_dim
            score_keys(query, keys, low, start, count, scale, scores[row], low)
    inverses = np.empty(scores.shape[0], np.float32)
    for row in range(rows):
        t, h = row_token[row], row_head[row]
        seen = scores[row][max(0, position + t + 1 - window) : position + t + 1]
        if soft_cap > 0:
            _cap(seen, soft_cap)
        inverses[row] = np.float32(1.0) / softmax_weights(seen, seen.shape[0])
        out[t, h * head_dim : (h + 1) * head_dim] = np.float32(0.0)
    for first in tiles:
        for row in range(rows):
            t, h = row_token[row], row_head[row]
            low = max(first, position + t + 1 - window)
            count = max(0, min(first + _TOKEN_TILE, position + t + 1) - low)
            result, start = out[t, h * head_dim : (h + 1) * head_dim], h // ratio * head_dim
            add_values(scores[row], low, values, low, start, count, result)
    for row in range(rows):
        t, h = row_token[row], row_head[row]
        for d in range(h * head_dim, (h + 1) * head_dim):
            out[t, d] *= inverses[row]


@cpu_kernel(inline=True)
def _fill_unseen(weights, unseen, width, value):
    """Put `value` where a query does not see a key: rows below `unseen` for the last query, one less for each before.

    Args:
        weights: float32, rows [width, COLUMNS].
    """
    for i in range(COLUMNS):
        for s in range(min(width, unseen - (COLUMNS - 1 - i))):
            weights[s * COLUMNS + i] = value


@cpu_kernel()
def attend_chunk(q, keys, values, position, head_dim, window, soft_cap, scratch, out):
    """Causal attention of a prefill chunk: T tokens at positions position[0] .. position[0] + T - 1.

    An item is COLUMNS queries of one head. Their scores are keys (rows) times queries (a panel), their results weights
    (transposed) times values (panels where they lie in the cache). Tiles of keys begin at multiples of KEY_TILE: a
    token's result has the same bits whatever other tokens are in its chunk. A tile before a token's window leaves its
    sums at 0, as if it had not been.

    Args:
        q, out: float32 [T, heads * head_dim].
        keys, values: float32 [positions, kv_heads * head_dim], contiguous.
        window, soft_cap: int64 and float32, see above.
        scratch: float32 [threads, at least chunk_scratch(head_dim)].
    """
    tokens = q.shape[0]
    heads, kv_dim = q.shape[1] // head_dim, keys.shape[1]
    ratio = heads // (kv_dim // head_dim)
    tiles = (tokens + COLUMNS - 1) // COLUMNS
    padded = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    scale = np.float32(1.0 / math.sqrt(head_dim))
    flat_values = values.reshape(-1)
    for item in prange(heads * tiles):
        h, turn = item // tiles, item % tiles
        first = (turn // 2 if turn % 2 == 0 else tiles - 1 - turn // 2) * COLUMNS  # short and long ones in turn
        count = min(COLUMNS, tokens - first)
        start = h // ratio * head_dim
        used = head_dim * COLUMNS
        query = scratch[get_thread_id(), :used]
        weights = scratch[get_thread_id(), used : used + KEY_TILE * COLUMNS]
        used += KEY_TILE * COLUMNS
        sums = scratch[get_thread_id(), used : used + COLUMNS * padded]
        used += COLUMNS * padded
        product = scratch[get_thread_id(), used : used + COLUMNS * padded]
        used += COLUMNS * padded
        state = scratch[get_thread_id(), used : used + 3 * COLUMNS]
        tile = scratch[get_thread_id(), used + 3 * COLUMNS :]

        for i in range(COLUMNS):
            token = min(first + i, tokens - 1)  # what is behind the last is computed and not stored
            row, column = q[token, h * head_dim : (h + 1) * head_dim], query[i::COLUMNS]
            for d in range(head_dim):
                column[d] = row[d] * scale
        for i in range(COLUMNS * padded):
            sums[i] = np.float32(0.0)
        for i in range(COLUMNS):
            state[i], state[COLUMNS + i] = _LOWEST, np.float32(0.0)
        last = position[0] + first + count
        for key in range(max(0, position[0] + first + 1 - window) // KEY_TILE * KEY_TILE, last, KEY_TILE):
            width = min(KEY_TILE, last - key)
            place = key * kv_dim + start
            multiply_rows(keys, place, kv_dim, width, query, 0, COLUMNS, head_dim, weights, 0, COLUMNS, False)
            if soft_cap > 0:
                _cap(weights[: width * COLUMNS], soft_cap)
            unseen = position[0] + first + COLUMNS - window - key  # rows that the last query does not see any more
            _fill_unseen(weights, unseen, width, _LOWEST)
            softmax_tile(weights, width, key, position[0] + first, state)
            _fill_unseen(weights, unseen, width, np.float32(0.0))
            for i in range(COLUMNS):
                if state[i] == _LOWEST:  # it has seen no key yet
                    state[COLUMNS + i] = np.float32(0.0)
            source, at, stride = flat_values, place, kv_dim
            if head_dim < padded:
                for s in range(width):
                    for d in range(padded):
                        tile[s * padded + d] = values[key + s, start + d] if d < head_dim else np.float32(0.0)
                source, at, stride = tile, 0, padded
            for d in range(0, padded, COLUMNS):
                multiply_columns(weights, 0, COLUMNS, COLUMNS, source, at + d, stride, width, product, d, padded, False)
            for i in range(COLUMNS):
                factor = state[2 * COLUMNS + i]
                total, part = sums[i * padded : (i + 1) * padded], product[i * padded : (i + 1) * padded]
                for d in range(padded):
                    total[d] = total[d] * factor + part[d]

        for i in range(count):
            total, result = sums[i * padded :], out[first + i, h * head_dim : (h + 1) * head_dim]
            for d in range(head_dim):
                result[d] = total[d] / state[COLUMNS + i]
