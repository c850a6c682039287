"""Embedding lookup: exact rows."""

import ml_dtypes
import numpy as np
import pytest
from closeness import poisoned

from numba_atomflow.ops.embedding import embed, embed_reference

FINITE = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)


@pytest.mark.parametrize("hidden", [1, 127, 128, 129, 200, 576])
@pytest.mark.parametrize("tokens", [1, 2, 65, 513])
def test_rows_of_the_table(rng: np.random.Generator, tokens: int, hidden: int) -> None:
    vocabulary = 50
    codes = rng.choice(FINITE, (vocabulary, hidden))
    scales = np.exp(rng.uniform(-15, 1, (vocabulary, -(-hidden // 128)))).astype(np.float32)
    ids = rng.integers(0, vocabulary, tokens).astype(np.int32)
    ids[0], ids[-1] = 0, vocabulary - 1
    residual = poisoned(tokens, hidden)
    embed(ids, codes.view(np.int8), scales, residual)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = np.array([[values[i, k] * scales[i, k // 128] for k in range(hidden)] for i in ids], np.float32)
    np.testing.assert_array_equal(residual, expected)  # a code times a scale: one rounding, the same everywhere
    np.testing.assert_array_equal(embed_reference(ids, codes, scales), expected)


@pytest.mark.parametrize("hidden", [1, 127, 200, 576])
def test_rows_of_a_table_in_float16(rng: np.random.Generator, hidden: int) -> None:
    bits = rng.integers(0, 1 << 16, (50, hidden)).astype(np.uint16)
    bits[bits & 0x7C00 == 0x7C00] = 0x03FF  # no NaN, no infinity, but subnormals
    ids = rng.integers(0, 50, 9).astype(np.int32)
    residual = poisoned(9, hidden)
    embed(ids, bits.view(np.int16), None, residual)
    np.testing.assert_array_equal(residual, bits.view(np.float16)[ids].astype(np.float32))


def test_subnormal_codes_and_signed_zeros() -> None:
    codes = np.array([[0x00, 0x80, 0x01, 0x81, 0x07, 0x87]], np.uint8)
    residual = poisoned(1, 6)
    embed(np.zeros(1, np.int32), codes.view(np.int8), np.full((1, 1), 0.5, np.float32), residual)
    assert (residual[0] * 1024).tolist() == [0.0, -0.0, 1.0, -1.0, 7.0, -7.0]
    assert np.signbit(residual[0]).tolist() == [False, True] * 3
