"""How many threads the kernels run on.

The most is the size of numba's pool: every core that this process may run on, or NUMBA_NUM_THREADS. By default it is
also no more than a container's CPU quota, in whole cores. The kernels' threads wait for each other at the end of every
parallel loop, 150 times a token: with more threads than quota, all would be stopped for a part of every 100 ms.
"""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numba
from numba.np.ufunc import parallel as pool

from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import shown
from numba_atomflow.host.cpu_quota import cpu_quota
from numba_atomflow.utils.arguments import whole_number

_SYSTEM = Path("/")

_anybody: AbstractContextManager[Any] = nullcontext()
_turns = threading.RLock()


def kernels_turn() -> AbstractContextManager[Any]:
    """To be held while kernels run, once numba has started its threads.

    Its workqueue layer, which serves where there is no OpenMP, ends a process in which two threads start parallel loops
    at the same time: there, threads take turns.
    """
    return _turns if pool._threading_layer == "workqueue" else _anybody  # noqa: SLF001  the public one checks again


def most_threads() -> int:
    """Size of numba's pool: thread numbers in kernels are below it."""
    return int(numba.config.NUMBA_NUM_THREADS)


def default_threads(root: Path = _SYSTEM) -> int:
    """Threads where nobody asks for a number.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    quota = cpu_quota(root)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else most_threads()
    return max(1, min(most_threads(), allowed, most_threads() if quota is None else int(quota)))


def choose_threads(wanted: int | None) -> int:
    """Threads that kernels run on: `wanted`, or the default.

    Raises:
        OptionError: `wanted` is not between 1 and the number of cores.
    """
    if wanted is None:
        return default_threads()
    wanted = whole_number("threads", wanted)
    if not 1 <= wanted <= most_threads():
        raise OptionError(f"threads is {shown(wanted)}; this machine allows 1 to {most_threads()}.")
    return wanted


def described(threads: int, wanted: int | None) -> str:
    """A number of threads for people, with the reason where nobody asked for it: "1 thread (CPU quota of 1.5)"."""
    quota = cpu_quota() if wanted is None and threads < most_threads() else None
    return f"{threads} thread{'s' if threads > 1 else ''}" + ("" if quota is None else f" (CPU quota of {quota:g})")
