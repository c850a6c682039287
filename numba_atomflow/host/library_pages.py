"""Memory of a shared library that was needed once, back to the system (Linux)."""

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")  # addresses, rights, file


class _Pages(NamedTuple):
    """Addresses of pages of a file that are as they are in it."""

    start: int
    stop: int


def release_llvm_pages() -> None:
    """Give back LLVM's code and constants, which only compiling and loading kernels need; what is used again is read
    from the file, or from the system's cache of it.

    Pages that the process has written to, as for relocations, stay. Elsewhere than on Linux nothing happens.
    Sources: proc_pid_smaps(5), madvise(2).
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    with suppress(OSError, AttributeError):  # no /proc, or a C library without madvise
        lines = Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines()
        madvise = ctypes.CDLL(None).madvise
        for start, stop in _unwritten(lines, "libllvmlite.so") if advice is not None else ():
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)  # fails for locked pages, which stay


def _unwritten(smaps: Iterable[str], name: str) -> Iterator[_Pages]:
    """Mappings of a file of this name that cannot be written to, and of which no page has been."""
    pages: _Pages | None = None
    for line in smaps:
        if mapping := _MAPPING.fullmatch(line):
            start, stop, rights, path = mapping.groups()
            ours = Path(path).name == name and rights[1] == "-" and rights[3] == "p"
            pages = _Pages(int(start, 16), int(stop, 16)) if ours else None
        elif pages and line.split() == ["Anonymous:", "0", "kB"]:
            yield pages
