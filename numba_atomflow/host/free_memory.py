"""Memory that was freed, back to the system."""

import ctypes
import sys
from contextlib import suppress


def return_free_memory() -> None:
    """Return what this process has freed and its C library keeps (glibc does), after work that is done once.

    Source: malloc_trim(3).
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
