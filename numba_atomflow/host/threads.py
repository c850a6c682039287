"""The number of CPU threads for kernels.

The maximum is the CPUs that this process may use, or NUMBA_NUM_THREADS. The default is one thread per core (`cores`),
and at most a container's CPU quota, in whole cores: threads synchronise at the end of every parallel loop, 150 times
per token, and with more threads than the quota all are throttled for a part of every 100 ms.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numba
from numba.np.ufunc import parallel as pool

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.host.cores import count_cores
from numba_atomflow.host.cpu_quota import cpu_quota
from numba_atomflow.host.pool import own_pool
from numba_atomflow.utils.arguments import whole_number

_SYSTEM = Path("/")

_no_lock: AbstractContextManager[Any] = nullcontext()
_lock = threading.RLock()


def kernel_turn() -> AbstractContextManager[Any]:
    """A lock to hold while kernels run, once numba has started its threads.

    numba's workqueue layer aborts the process if two threads start parallel loops at the same time. Other pools need no
    lock.
    """
    one_at_a_time = pool._threading_layer == "workqueue" and own_pool() is None  # noqa: SLF001  the public is slower
    return _lock if one_at_a_time else _no_lock


def use_threads(count: int) -> None:
    """Run the loops that this thread starts from now on with so many threads."""
    own = own_pool()
    if own is None:
        numba.set_num_threads(count)
    else:
        own.set_threads(count)


@contextmanager
def threads_in_use(count: int) -> Iterator[None]:
    """Run the loops that this thread starts in the block with so many threads."""
    own = own_pool()
    previous = numba.get_num_threads() if own is None else own.threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(previous)


def max_threads() -> int:
    """The most threads of a loop; thread indices in kernels are below it."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads(root: Path = _SYSTEM) -> int:
    """Threads if no number is requested.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(max_threads()))
    quota = cpu_quota(root)
    return max(1, min(max_threads(), count_cores(allowed, root), max_threads() if quota is None else int(quota)))


def choose_threads(requested: int | None) -> int:
    """Threads for kernels: as requested, or the default.

    Raises:
        OptionError: `requested` is not between 1 and the number of cores.
    """
    if requested is None:
        return default_threads()
    requested = whole_number("threads", requested)
    if not 1 <= requested <= max_threads():
        raise OptionError(f"threads is {quote(requested)}; this machine allows 1 to {max_threads()}.")
    return requested


def describe_threads(threads: int, requested: int | None) -> str:
    """The number of threads as text, with the reason if a quota limits it: "1 thread (CPU quota of 1.5)"."""
    quota = cpu_quota() if requested is None and threads < max_threads() else None
    limits = quota is not None and max(1, int(quota)) == threads
    return f"{threads} thread{'s' if threads > 1 else ''}" + (f" (CPU quota of {quota:g})" if limits else "")
