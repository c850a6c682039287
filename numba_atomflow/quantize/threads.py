"""Cores for BLAS or for kernels, never for both at the same time.

Each has its own thread pool, whose threads spin for a while after their work. Frequent alternation would make the two
pools compete for the cores. "All cores" are those of `default_threads`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import scipy.linalg.cython_blas  # noqa: F401  the BLAS that compiled code calls must be loaded to be limited
from threadpoolctl import threadpool_limits

from numba_atomflow.host.threads import default_threads, kernel_turn, threads_in_use


@contextmanager
def cores_for_kernels() -> Iterator[None]:
    """Kernels use all cores, BLAS the calling thread only; needed by kernels that call BLAS."""
    with threads_in_use(default_threads()), kernel_turn(), threadpool_limits(limits=1, user_api="blas"):
        yield


@contextmanager
def cores_for_blas() -> Iterator[None]:
    """BLAS uses all cores, kernels one."""
    with threads_in_use(1), kernel_turn(), threadpool_limits(limits=default_threads(), user_api="blas"):
        yield
