"""Cores for BLAS or for kernels, never for both at the same time.

Each has its own thread pool, whose threads spin for a while after their work. Frequent alternation would make the two
pools compete for the cores. "All cores" are those of `default_threads`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import scipy.linalg.cython_blas  # noqa: F401  the BLAS that compiled code calls must be loaded to be limited
from threadpoolctl import threadpool_limits

from numba_atomflow.host.threads import default_threads, kernel_turn


@contextmanager
def cores_for_kernels() -> Iterator[None]:
    """Kernels use all cores, BLAS the calling thread only; needed by kernels that call BLAS."""
    with _kernel_threads(default_threads()), threadpool_limits(limits=1, user_api="blas"):
        yield


@contextmanager
def cores_for_blas() -> Iterator[None]:
    """BLAS uses all cores, kernels one."""
    with _kernel_threads(1), threadpool_limits(limits=default_threads(), user_api="blas"):
        yield


@contextmanager
def _kernel_threads(count: int) -> Iterator[None]:
    threads = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        with kernel_turn():
            yield
    finally:
        numba.set_num_threads(threads)
