"""Which of the CPUs of this process are worth a thread: one per core, and of two kinds of cores the fast ones.

Two hyper-threads share the arithmetic units that a kernel keeps busy. A loop's work is shared out in pieces, so a slow
core would do its part, but prompts are cut into one part per thread.
Source: Linux kernel, Documentation/admin-guide/cputopology.rst, Documentation/ABI/testing/sysfs-devices-system-cpu
(cpu_capacity); Intel's hybrid processors list their performance cores at the device cpu_core.
"""

from contextlib import suppress
from pathlib import Path

_LEAST_CAPACITY = 0.75  # of the fastest core's: cores of one kind differ by less


def count_cores(cpus: set[int], root: Path) -> int:
    """Threads that are worth it on these CPUs, at least 1.

    Args:
        cpus: numbers of the CPUs that this process may use.
        root: folder that holds ``sys``. What it does not tell does not count.
    """
    folder = root / "sys/devices/system/cpu"
    fast = _fast(cpus, root)
    cores = {min(_list(folder / f"cpu{cpu}/topology/thread_siblings_list"), default=cpu) for cpu in fast}
    return max(1, len(cores))


def _fast(cpus: set[int], root: Path) -> set[int]:
    """Those of the fast kind, or all where there is one kind."""
    performance = cpus & _list(root / "sys/devices/cpu_core/cpus")
    if performance:
        return performance
    capacities = {cpu: _number(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cpus}
    least = _LEAST_CAPACITY * max(capacities.values(), default=0)
    return {cpu for cpu, capacity in capacities.items() if capacity >= least}


def _list(path: Path) -> set[int]:
    """Numbers of a list such as ``0-3,8``; none if there is no such file."""
    numbers: set[int] = set()
    with suppress(OSError, ValueError):
        for part in path.read_text(encoding="ascii", errors="replace").strip().split(","):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _number(path: Path) -> int:
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="ascii", errors="replace"))
    return 0
