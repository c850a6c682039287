"""Grouped-query attention (GQA) over a contiguous KV cache.

One layer's cache is two arrays [positions, kv_heads * head_dim]: the row of a key is its position. Query head h reads
KV head h // ratio. Softmax is computed in float32 with the maximum subtracted.

Cost model, one token at length S: 8 * S * kv_dim bytes (float32 cache). A prefill chunk of T tokens: 4 * T * S * q_dim
operations, done by BLAS on tiles, with the running max and row sum of online softmax (Milakov and Gimelshein, 2018).
"""

import math

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from numba_atomflow.ops.activation import exp
from numba_atomflow.ops.jit import cpu_kernel

QUERY_TILE = 128  # queries of one head that share a pass over the keys
KEY_TILE = 256  # keys copied together into contiguous scratch
_LOWEST = np.float32(-3.0e38)


def chunk_scratch(head_dim: int) -> int:
    """Floats of scratch per thread that `attend_chunk` needs."""
    return (2 * QUERY_TILE + KEY_TILE) * head_dim + QUERY_TILE * (KEY_TILE + head_dim + 2)


def attend_reference(
    q: NDArray[np.float64], keys: NDArray[np.float64], values: NDArray[np.float64], position: int, head_dim: int
) -> NDArray[np.float64]:
    """q [T, heads * head_dim] at positions position .. position + T - 1 -> [T, heads * head_dim]."""
    tokens, heads, kv_heads = len(q), q.shape[1] // head_dim, keys.shape[1] // head_dim
    out = np.empty_like(q)
    for t in range(tokens):
        length = position + t + 1
        for h in range(heads):
            kv = slice(h * kv_heads // heads * head_dim, (h * kv_heads // heads + 1) * head_dim)
            head = slice(h * head_dim, (h + 1) * head_dim)
            scores = keys[:length, kv] @ q[t, head] / math.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values[:length, kv] / weights.sum()
    return out


@cpu_kernel(inline=True)
def attend_head(query, keys, values, start, length, block_table, block_size, scores, result):
    """One query over `length` keys of one KV head.

    Args:
        query, result: float32 [head_dim].
        keys, values: float32 [rows, kv_heads * head_dim]; the head's elements begin at `start`.
        block_table: int32, the KV blocks of a sequence in a paged cache, each of `block_size` positions
            (ops/paged_attention.py). None for a contiguous cache, which is one block of `block_size` = `length`.
        scores: float32 [at least length], scratch.
    """
    head_dim = query.shape[0]
    scale = np.float32(1.0 / math.sqrt(head_dim))
    running_max = _LOWEST
    for first in range(0, length, block_size):
        row = 0 if block_table is None else block_table[first // block_size] * block_size
        for s in range(first, min(first + block_size, length)):
            key = keys[row + s - first, start : start + head_dim]
            dot = np.float32(0.0)
            for d in range(head_dim):
                dot += query[d] * key[d]
            scores[s] = dot * scale
            running_max = max(running_max, dot * scale)
    row_sum = np.float32(0.0)
    for s in range(length):
        weight = exp(scores[s] - running_max)
        scores[s] = weight
        row_sum += weight
    result[:] = np.float32(0.0)
    for first in range(0, length, block_size):
        row = 0 if block_table is None else block_table[first // block_size] * block_size
        for s in range(first, min(first + block_size, length)):
            value = values[row + s - first, start : start + head_dim]
            weight = scores[s]
            for d in range(head_dim):
                result[d] += weight * value[d]
    for d in range(head_dim):
        result[d] /= row_sum


@cpu_kernel()
def attend_token(q, keys, values, position, head_dim, scores, out):
    """Attention of one token.

    Args:
        q: float32 [heads * head_dim]. out: the same shape.
        keys, values: float32 [positions, kv_heads * head_dim]; rows 0 .. position[0] are read.
        position: int64 [1], the token's own position.
        scores: float32 [heads, positions], scratch.
    """
    heads = q.shape[0] // head_dim
    ratio = heads // (keys.shape[1] // head_dim)
    length = position[0] + 1
    for h in prange(heads):
        query = q[h * head_dim : (h + 1) * head_dim]
        result = out[h * head_dim : (h + 1) * head_dim]
        attend_head(query, keys, values, h // ratio * head_dim, length, None, length, scores[h], result)


@cpu_kernel()
def attend_chunk(q, keys, values, position, head_dim, scratch, out):
    """Causal attention of a prefill chunk: T tokens at positions position[0] .. position[0] + T - 1.

    Args:
        q, out: float32 [T, heads * head_dim].
        keys, values: float32 [positions, kv_heads * head_dim].
        scratch: float32 [threads, at least chunk_scratch(head_dim)].
    """
    tokens = q.shape[0]
    heads = q.shape[1] // head_dim
    ratio = heads // (keys.shape[1] // head_dim)
    query_tiles = (tokens + QUERY_TILE - 1) // QUERY_TILE
    scale = np.float32(1.0 / math.sqrt(head_dim))
    for item in prange(heads * query_tiles):  # head-major: every thread gets short and long tiles
        h, first = item // query_tiles, item % query_tiles * QUERY_TILE
        count = min(QUERY_TILE, tokens - first)
        start = h // ratio * head_dim
        thread_scratch = scratch[get_thread_id()]
        query = thread_scratch[: count * head_dim].reshape((count, head_dim))
        used = QUERY_TILE * head_dim
        sums = thread_scratch[used : used + count * head_dim].reshape((count, head_dim))
        used += QUERY_TILE * head_dim
        kv_tile = thread_scratch[used : used + KEY_TILE * head_dim]
        used += KEY_TILE * head_dim
        weights_tile = thread_scratch[used : used + QUERY_TILE * KEY_TILE]
        used += QUERY_TILE * KEY_TILE
        product = thread_scratch[used : used + count * head_dim].reshape((count, head_dim))
        used += QUERY_TILE * head_dim
        running_max = thread_scratch[used : used + count]
        row_sums = thread_scratch[used + QUERY_TILE : used + QUERY_TILE + count]

        for i in range(count):
            for d in range(head_dim):
                query[i, d] = q[first + i, h * head_dim + d] * scale
                sums[i, d] = np.float32(0.0)
            running_max[i] = _LOWEST
            row_sums[i] = np.float32(0.0)

        length = position[0] + first + count  # keys visible to the last query of the tile
        for key_start in range(0, length, KEY_TILE):
            width = min(KEY_TILE, length - key_start)
            tile = kv_tile[: width * head_dim].reshape((width, head_dim))
            weights = weights_tile[: count * width].reshape((count, width))
            for s in range(width):
                for d in range(head_dim):
                    tile[s, d] = keys[key_start + s, start + d]
            np.dot(query, tile.T, weights)
            for i in range(count):
                visible = min(width, position[0] + first + i + 1 - key_start)  # at most 0: none of this tile
                new_max = running_max[i]
                for s in range(visible):
                    new_max = max(new_max, weights[i, s])
                rescale = exp(running_max[i] - new_max)
                tile_sum = np.float32(0.0)
                for s in range(visible):
                    weights[i, s] = exp(weights[i, s] - new_max)
                    tile_sum += weights[i, s]
                for s in range(max(visible, 0), width):
                    weights[i, s] = np.float32(0.0)
                row_sums[i] = row_sums[i] * rescale + tile_sum
                running_max[i] = new_max
                for d in range(head_dim):
                    sums[i, d] *= rescale
            for s in range(width):
                for d in range(head_dim):
                    tile[s, d] = values[key_start + s, start + d]
            np.dot(weights, tile, product)
            for i in range(count):
                for d in range(head_dim):
                    sums[i, d] += product[i, d]

        for i in range(count):
            for d in range(head_dim):
                out[first + i, h * head_dim + d] = sums[i, d] / row_sums[i]
