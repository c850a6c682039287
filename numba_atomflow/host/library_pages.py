"""Memory of shared libraries that was needed once, back to the system (Linux)."""

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Pages(NamedTuple):
    """Addresses of pages of a file that are as they are in it."""

    start: int
    stop: int


# Those that a Python process never unloads: Python, its extension modules, numba's LLVM and NumPy's OpenBLAS, and what
# these load. Another library might be unloaded, and its addresses reused, while this module looks at it.
_LIBRARY = re.compile(
    r"lib(python|llvmlite|scipy_openblas|gfortran|quadmath|stdc\+\+|crypto|ssl|c|m)[^a-z].*|.*\.(cpython-|abi3).*"
)


def release_library_pages() -> None:
    """Give back code and constants of libraries that starting took: LLVM's, which only compiling and loading kernels
    need, OpenSSL's, Python's own. What is used again is read from the file, or from the system's cache of it.

    Pages that the process has written to, as for relocations, stay. Elsewhere than on Linux nothing happens.
    Sources: proc_pid_smaps(5), madvise(2).
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None:
        return
    with suppress(OSError, AttributeError):  # no /proc, or a C library without madvise
        madvise = ctypes.CDLL(None).madvise
        with Path("/proc/self/smaps").open(errors="surrogateescape") as lines:
            unwritten = list(_unwritten(lines))
        for start, stop in unwritten:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)  # fails for locked pages, which stay


def _unwritten(smaps: Iterable[str]) -> Iterator[_Pages]:
    """Mappings of libraries that cannot be written to, and of which no page has been."""
    pages: _Pages | None = None
    for line in smaps:
        if line[0] in "0123456789abcdef":  # 20 lines of figures follow, whose names begin with capitals
            addresses, rights, _, _, _, *path = line.rstrip("\n").split(maxsplit=5)
            start, stop = (int(address, 16) for address in addresses.split("-"))
            ours = path and rights[1] == "-" and rights[3] == "p" and _LIBRARY.fullmatch(path[0].rpartition("/")[2])
            pages = _Pages(start, stop) if ours else None
        elif pages and line.startswith("Anonymous:") and line.split()[1] == "0":
            yield pages
