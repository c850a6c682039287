"""The number of CPU threads for kernels.

The maximum is the size of numba's pool: the cores that this process may use, or NUMBA_NUM_THREADS. The default is also
at most a container's CPU quota, in whole cores: threads synchronise at the end of every parallel loop, 150 times per
token, and with more threads than the quota all are throttled for a part of every 100 ms.
"""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numba
from numba.np.ufunc import parallel as pool

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.host.cpu_quota import cpu_quota
from numba_atomflow.utils.arguments import whole_number

_SYSTEM = Path("/")

_no_lock: AbstractContextManager[Any] = nullcontext()
_lock = threading.RLock()


def kernel_turn() -> AbstractContextManager[Any]:
    """A lock to hold while kernels run, once numba has started its threads.

    numba's workqueue layer, the fallback without OpenMP, aborts the process if two threads start parallel loops at the
    same time. Other layers need no lock.
    """
    return _lock if pool._threading_layer == "workqueue" else _no_lock  # noqa: SLF001  the public function is slower


def max_threads() -> int:
    """Size of numba's pool; thread indices in kernels are below it."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads(root: Path = _SYSTEM) -> int:
    """Threads if no number is requested.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    quota = cpu_quota(root)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else max_threads()
    return max(1, min(max_threads(), allowed, max_threads() if quota is None else int(quota)))


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
    return f"{threads} thread{'s' if threads > 1 else ''}" + ("" if quota is None else f" (CPU quota of {quota:g})")
