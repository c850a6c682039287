"""Achievable memory bandwidth of this machine: a sum over more bytes than any cache holds.

It is the ceiling of decoding, which reads every weight once a token. Cost: one pass over the data in a parallel loop,
whose additions overlap with the loads.
"""

import time

import numpy as np
from numba import prange
from numpy.typing import NDArray

from numba_atomflow.ops.jit import cpu_kernel

BYTES = 1 << 30


def total_reference(x: NDArray[np.float32]) -> float:
    """What `total` computes."""
    return float(np.sum(x, dtype=np.float64))


@cpu_kernel()
def total(x):
    """Sum of float32 [n], in any order."""
    result = np.float32(0.0)
    for i in prange(x.size):
        result += x[i]
    return result


def read_bandwidth(nbytes: int = BYTES, repeats: int = 5) -> float:
    """GB/s of reading `nbytes` on all threads that numba is set to use: the best of `repeats` passes."""
    data = np.ones(nbytes // 4, np.float32)
    total(data[:1000])  # compiled, and threads started
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        total(data)
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best / 1e9
