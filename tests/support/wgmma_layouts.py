"""Operands of `wgmma` in memory and in registers, as PTX ISA 9.0 (section 9.7.15) has them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.fp8 import e4m3_to_float

K_STEPS = 4  # instructions that share a row of 128 bytes


def swizzled_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Rows of 128 bytes [rows, 32 words] as the 128-byte swizzle has them."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    out = np.empty_like(words)
    for row in range(len(words)):
        for chunk in range(8):
            out[row, 4 * (chunk ^ row % 8) :][:4] = words[row, 4 * chunk : 4 * chunk + 4]
    return out.reshape(-1)


def fragments(a: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Words [64, 32] of A to [k-step, register, thread]: the fragments of mma.m16n8k16, one warp on the other."""
    out = np.empty((K_STEPS, 4, 128), np.uint32)
    for thread in range(128):
        row, word = thread // 32 * 16 + thread % 32 // 4, thread % 4
        for step in range(K_STEPS):
            low, high = a[row, 8 * step :], a[row + 8, 8 * step :]
            out[step, :, thread] = low[word], high[word], low[word + 4], high[word + 4]
    return out


def numbers(words: NDArray[np.uint32], element: str) -> NDArray[np.float64]:
    if element == "f16":
        return words.view(np.float16).astype(np.float64)
    return e4m3_to_float(words.view(np.uint8)).astype(np.float64)


def random_rows(rows: int, element: str, rng: np.random.Generator) -> NDArray[np.uint32]:
    """Words [rows, 32]."""
    if element == "f16":
        return rng.standard_normal((rows, 64)).astype(np.float16).view(np.uint32)
    codes = rng.integers(0, 256, (rows, 128)).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 1
    return codes.view(np.uint32)
