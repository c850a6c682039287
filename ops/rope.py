"""Rotary position embedding, and the write of new keys and values into the cache.

Element i of a head is rotated together with element i + head_dim / 2 (Hugging Face's pairing), by position times
frequency[i]. Sines and cosines come from a table computed once in float64: [positions, head_dim / 2] each.
Cost model: 8 bytes per element of q, k and v; the table rows of a few positions stay in cache.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.jit import cpu_kernel


def rope_table(
    inverse_frequencies: NDArray[np.float64], positions: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines for positions 0 .. positions - 1: two float32 arrays [positions, head_dim / 2]."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * inverse_frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_reference(
    heads: NDArray[np.float64], cosines: NDArray[np.float64], sines: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rotate heads [T, n, head_dim] by the table rows of their positions, [T, head_dim / 2] each."""
    half = heads.shape[-1] // 2
    low, high = heads[..., :half], heads[..., half:]
    c, s = cosines[:, None, :], sines[:, None, :]
    return np.concatenate([low * c - high * s, high * c + low * s], axis=-1)


@cpu_kernel(inline=True)
def _rotate(source, cosines, sines, out):
    """One head: source [2 * half] rotated into out."""
    half = cosines.shape[0]
    low, high, out_low, out_high = source[:half], source[half:], out[:half], out[half:]
    for i in range(half):
        out_low[i] = low[i] * cosines[i] - high[i] * sines[i]
        out_high[i] = high[i] * cosines[i] + low[i] * sines[i]


@cpu_kernel(inline=True)
def _store_token(qkv, position, slot, cosines, sines, q, keys, values):
    """One token: q rotated into q [q_dim]; k rotated and v into row `slot` of the cache."""
    q_dim, kv_dim, head_dim = q.shape[0], keys.shape[1], 2 * cosines.shape[1]
    k, v = qkv[q_dim : q_dim + kv_dim], qkv[q_dim + kv_dim :]
    for start in range(0, q_dim, head_dim):
        stop = start + head_dim
        _rotate(qkv[start:stop], cosines[position], sines[position], q[start:stop])
    for start in range(0, kv_dim, head_dim):
        stop = start + head_dim
        _rotate(k[start:stop], cosines[position], sines[position], keys[slot, start:stop])
    for i in range(kv_dim):
        values[slot, i] = v[i]


@cpu_kernel(parallel=False)
def rope_and_store(qkv, position, cosines, sines, q, keys, values):
    """Split qkv, rotate q and k, and append k and v to one layer's cache.

    Args:
        qkv: float32 [T, q_dim + 2 * kv_dim], the projection's output.
        position: int64 [1], cache row and rotary position of the first of the T tokens.
        cosines, sines: float32 [positions, head_dim / 2].
        q: float32 [T, q_dim], out.
        keys, values: float32 [positions, kv_dim], written at rows position .. position + T - 1.
    """
    for t in range(qkv.shape[0]):
        slot = position[0] + t
        _store_token(qkv[t], slot, slot, cosines, sines, q[t], keys, values)


@cpu_kernel(parallel=False)
def rope_and_store_paged(qkv, positions, slots, cosines, sines, q, keys, values):
    """The same for tokens of any sequences: token t has rotary position positions[t] and cache row slots[t].

    Args:
        positions, slots: int64 [T].
        keys, values: float32 [slots of the cache, kv_dim].
    """
    for t in range(qkv.shape[0]):
        _store_token(qkv[t], positions[t], slots[t], cosines, sines, q[t], keys, values)
