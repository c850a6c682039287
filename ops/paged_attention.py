"""Grouped-query attention over a paged KV cache, for tokens of several sequences at once.

One layer's cache is two arrays [slots, kv_heads * head_dim]. Position s of a sequence lies in slot
``blocks[s // block_size] * block_size + s % block_size``, with `blocks` the sequence's row of the block table. A token
attends to positions 0 to its own (causal). Tokens of one prompt have the same row; their keys are all in the cache
before any of them attends.

Cost model: that of contiguous attention (8 * S * kv_dim bytes per token), and one look-up per KV block.
"""

import math

import numpy as np
from numba import get_thread_id, prange
from numpy.typing import NDArray

from numba_atomflow.ops.attention import attend_reference
from numba_atomflow.ops.jit import cpu_kernel
from numba_atomflow.ops.simd_attention import add_values, score_keys, softmax_weights


def attend_paged_reference(
    q: NDArray[np.float64],
    keys: NDArray[np.float64],
    values: NDArray[np.float64],
    block_table: NDArray[np.int32],
    table_rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    block_size: int,
    head_dim: int,
) -> NDArray[np.float64]:
    """What `attend_paged` computes: the slots of each sequence are gathered into a contiguous cache."""
    out = np.empty_like(q)
    for t, (row, position) in enumerate(zip(table_rows.tolist(), positions.tolist(), strict=True)):
        slots = [block_table[row, s // block_size] * block_size + s % block_size for s in range(position + 1)]
        out[t] = attend_reference(q[t : t + 1], keys[slots], values[slots], position, head_dim)[0]
    return out


@cpu_kernel()
def attend_paged(q, keys, values, block_table, table_rows, positions, block_size, head_dim, scores, out):
    """Attention of T tokens, each over its own sequence.

    Args:
        q, out: float32 [T, heads * head_dim].
        keys, values: float32 [slots, kv_heads * head_dim].
        block_table: int32 [rows, width], KV blocks of each sequence in the order of positions.
        table_rows: int64 [T], row of the block table. positions: int64 [T].
        scores: float32 [threads, longest sequence], scratch.
    """
    heads = q.shape[1] // head_dim
    ratio = heads // (keys.shape[1] // head_dim)
    scale = np.float32(1.0 / math.sqrt(head_dim))
    for item in prange(q.shape[0] * heads):
        t, h = item // heads, item % heads
        query = q[t, h * head_dim : (h + 1) * head_dim]
        result = out[t, h * head_dim : (h + 1) * head_dim]
        blocks, length, start = block_table[table_rows[t]], positions[t] + 1, h // ratio * head_dim
        weights = scores[get_thread_id()]
        for first in range(0, length, block_size):
            row, count = blocks[first // block_size] * block_size, min(block_size, length - first)
            score_keys(query, keys, row, start, count, scale, weights, first)
        inverse = np.float32(1.0) / softmax_weights(weights, length)
        result[:] = np.float32(0.0)
        for first in range(0, length, block_size):
            row, count = blocks[first // block_size] * block_size, min(block_size, length - first)
            add_values(weights, first, values, row, start, count, result)
        for d in range(head_dim):
            result[d] *= inverse
