"""Attention and the cache write over a paged KV cache, beside the contiguous kernels on the same data."""

import numba
import numpy as np
import pytest
from closeness import poisoned

from numba_atomflow.memory.paged import BLOCK_SIZES
from numba_atomflow.ops.attention import NO_CAP, NO_WINDOW, attend_tokens
from numba_atomflow.ops.paged_attention import attend_paged, attend_paged_reference
from numba_atomflow.ops.rope import rope_and_store, rope_and_store_paged, rope_table

LENGTHS = (1, 2, 7, 8, 9, 31, 64, 150)  # of the sequences of one step


def scattered(
    rng: np.random.Generator, block_size: int, kv_dim: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """A cache of blocks in random order, with noise between them; its block table; the slots of each sequence."""
    counts = [-(-length // block_size) for length in LENGTHS]
    order = rng.permutation(sum(counts) + 3).astype(np.int32)
    block_table = np.full((len(LENGTHS), max(counts)), 2**30, np.int32)  # an invalid index
    cache = np.full((2, len(order) * block_size, kv_dim), np.nan, np.float32)
    slots, taken = [], 0
    for row, (length, count) in enumerate(zip(LENGTHS, counts, strict=True)):
        block_table[row, :count] = order[taken : taken + count]
        taken += count
        positions = np.arange(length)
        slots.append(block_table[row, positions // block_size] * block_size + positions % block_size)
        cache[:, slots[-1]] = rng.standard_normal((2, length, kv_dim))
    return cache, block_table, slots


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 9, 3), (80, 2, 2), (128, 8, 2)])
def test_paged_attention_is_contiguous_attention_bit_for_bit(
    rng: np.random.Generator, block_size: int, head_dim: int, heads: int, kv_heads: int
) -> None:
    cache, block_table, slots = scattered(rng, block_size, kv_heads * head_dim)
    q = rng.standard_normal((len(LENGTHS), heads * head_dim)).astype(np.float32)
    rows, positions = np.arange(len(LENGTHS)), np.array(LENGTHS) - 1
    scores, out = poisoned(numba.config.NUMBA_NUM_THREADS, max(LENGTHS)), poisoned(*q.shape)
    attend_paged(q, *cache, block_table, rows, positions, block_size, head_dim, scores, out)
    for row, own in enumerate(slots):
        keys, values = np.ascontiguousarray(cache[0, own]), np.ascontiguousarray(cache[1, own])
        one, expected = poisoned(numba.config.NUMBA_NUM_THREADS, 1, len(own)), poisoned(1, q.shape[1])
        attend_tokens(
            q[row : row + 1], keys, values, positions[row : row + 1], head_dim, NO_WINDOW, NO_CAP, one, expected
        )
        np.testing.assert_array_equal(out[row], expected[0])
    exact = (array.astype(np.float64) for array in (q, *cache))
    reference = attend_paged_reference(*exact, block_table, rows, positions, block_size, head_dim)
    assert np.linalg.norm(out - reference) <= 1e-5 * np.linalg.norm(reference)


def test_the_paged_write_is_the_contiguous_write(rng: np.random.Generator) -> None:
    dim, q_dim, kv_dim, tokens = 64, 192, 128, 5
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), 40)
    qkv = rng.standard_normal((tokens, q_dim + 2 * kv_dim)).astype(np.float32)
    positions, slots = rng.permutation(40)[:tokens], rng.permutation(64)[:tokens]
    q, keys, values = poisoned(tokens, q_dim), poisoned(64, kv_dim), poisoned(64, kv_dim)
    rope_and_store_paged(qkv, positions, slots, cosines, sines, q, keys, values)
    for t in range(tokens):
        one_q, one_keys, one_values = poisoned(1, q_dim), poisoned(40, kv_dim), poisoned(40, kv_dim)
        rope_and_store(qkv[t : t + 1], positions[t : t + 1], cosines, sines, one_q, one_keys, one_values)
        np.testing.assert_array_equal(q[t], one_q[0])
        np.testing.assert_array_equal(keys[slots[t]], one_keys[positions[t]])
        np.testing.assert_array_equal(values[slots[t]], one_values[positions[t]])
    untouched = np.setdiff1d(np.arange(64), slots)
    assert np.isnan(keys[untouched]).all()
    assert np.isnan(values[untouched]).all()
