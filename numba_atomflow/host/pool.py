"""The thread pool of the CPU kernels, in place of numba's.

numba's pools cut a loop into one piece per thread and wait for all threads. A decode step has 150 loops, and where
another program has one of the cores, each of them waits until the scheduler lets the slowest thread go on: some
milliseconds a loop. This pool waits only for pieces that a thread has begun (`pool_code` says how), sleeps when there
is nothing to do, and starts its threads anew in a forked process.

It runs on Linux, x86-64 and aarch64. Elsewhere, and where NUMBA_THREADING_LAYER names one of numba's pools, that one
runs the kernels.
"""

import ctypes
import platform
import sys
from functools import cache
from typing import Any

from numba.core import config

from numba_atomflow.errors import BackendError
from numba_atomflow.host.machine_code import load_code

SPIN_NS = 60_000  # of a waiting thread, before it sleeps: longer than what lies between two loops of a step
_PREFIX = "atomflow_"
# What kernels call: numba's names, and our functions with the same parameters.
_FUNCTIONS = {
    "numba_parallel_for": "parallel_for",
    "get_thread_id": "get_thread_id",
    "get_num_threads": "get_num_threads",
    "get_sched_size": "get_sched_size",
}
SYMBOLS = {name: _PREFIX + own for name, own in _FUNCTIONS.items()}


class Pool:
    """The one pool of a process: its threads start at the first loop that wants them."""

    def __init__(self) -> None:
        from llvmlite import binding

        from numba_atomflow.host.pool_code import CODE

        self._engine = load_code("thread-pool", CODE)
        if self._function("make_keys")():
            raise BackendError(
                "This process has no thread-local key left for the CPU kernels' threads (pthread_key_create); "
                "load fewer libraries into it, or set NUMBA_THREADING_LAYER=omp."
            )
        for own in _FUNCTIONS.values():
            binding.add_symbol(_PREFIX + own, self._engine.get_function_address(own))
        self._set_threads = self._function("set_num_threads", ctypes.c_int64)
        self._get_threads = self._function("get_num_threads")
        self._spin = self._global("spin_ns")
        self._global("default_threads").value = config.NUMBA_NUM_THREADS
        self.spin_ns = SPIN_NS

    def _function(self, name: str, *parameters: Any) -> Any:
        return ctypes.PYFUNCTYPE(ctypes.c_int64, *parameters)(self._engine.get_function_address(name))

    def _global(self, name: str) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._engine.get_global_value_address(name))

    def set_threads(self, count: int) -> None:
        """Threads of the loops that this thread starts from now on."""
        self._set_threads(count)

    def threads(self) -> int:
        """Threads of the loops that this thread starts."""
        return int(self._get_threads())

    def workers(self) -> int:
        """Threads that exist, the caller included."""
        return self._global("workers").value

    @property
    def spin_ns(self) -> int:
        """How long a waiting thread spins before it sleeps."""
        return self._spin.value

    @spin_ns.setter
    def spin_ns(self, duration: int) -> None:
        self._spin.value = duration

    def forget_threads(self) -> None:
        """In a forked process, which has none: the next loop starts them."""
        self._function("forget_threads")()


def is_available() -> bool:
    """Whether this pool runs the kernels, and not one of numba's."""
    known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return known and str(config.THREADING_LAYER).lower() == "default"


@cache
def own_pool() -> Pool | None:
    """The pool, or None: numba's."""
    return Pool() if is_available() else None
