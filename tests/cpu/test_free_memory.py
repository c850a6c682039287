"""Memory that was freed goes back to the system."""

import sys

import pytest
from child_processes import run

PROGRAM = """
from numba_atomflow.host.free_memory import return_free_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks = [bytes(1000) for _ in range(100_000)]
kept = blocks[::50]  # between freed blocks: the heap's end stays in use
del blocks
before = resident()
return_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and glibc")
def test_free_memory_between_used_blocks_is_returned() -> None:
    returned = int(run([sys.executable, "-c", PROGRAM], text=True, check=True).stdout)
    assert returned > 50_000_000  # of 98 MB that are free
