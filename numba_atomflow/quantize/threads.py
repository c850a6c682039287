"""Cores for BLAS or for kernels, never for both at once.

Each has threads of its own, which go on spinning for a while when their work is done: alternating between the two many
times a second, they would spend most of it in each other's way. "All cores" are those of `default_threads`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import scipy.linalg.cython_blas  # noqa: F401  the BLAS that compiled code calls must be loaded to be limited
from threadpoolctl import threadpool_limits

from numba_atomflow.host.threads import default_threads, kernels_turn


@contextmanager
def cores_for_kernels() -> Iterator[None]:
    """Kernels run on all cores, and BLAS on the one that calls it; kernels that call BLAS need this."""
    with _kernel_threads(default_threads()), threadpool_limits(limits=1, user_api="blas"):
        yield


@contextmanager
def cores_for_blas() -> Iterator[None]:
    """BLAS runs on all cores, kernels on one."""
    with _kernel_threads(1), threadpool_limits(limits=default_threads(), user_api="blas"):
        yield


@contextmanager
def _kernel_threads(count: int) -> Iterator[None]:
    threads = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        with kernels_turn():
            yield
    finally:
        numba.set_num_threads(threads)
