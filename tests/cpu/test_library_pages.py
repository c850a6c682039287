"""LLVM's pages leave the process once kernels are loaded, and come back when it compiles again."""

import json
import sys
from pathlib import Path

import pytest
from child_processes import run
from cli_runner import environment
from tiny_models import tiny_geometry, write_checkpoint

from numba_atomflow import home
from numba_atomflow.host.library_pages import _unwritten

SMAPS = """\
7f00000000-7f00003000 r--p 00000000 fe:00 5325270                    /a folder/libllvmlite.so
Rss:                  12 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
7f00003000-7f00009000 r-xp 00003000 fe:00 5325270                    /a folder/libllvmlite.so
Anonymous:             0 kB
7f00009000-7f0000a000 r--p 00009000 fe:00 5325270                    /a folder/libllvmlite.so
Anonymous:             4 kB
7f0000a000-7f0000b000 rw-p 0000a000 fe:00 5325270                    /a folder/libllvmlite.so
Anonymous:             0 kB
7f0000b000-7f0000c000 r-xp 00000000 fe:00 5325271                    /lib/libc.so.6
Anonymous:             0 kB
7f0000c000-7f0000d000 r--p 00000000 00:00 0
Anonymous:             0 kB
"""

LOAD = """
import json, sys
from pathlib import Path
from numba_atomflow import Engine, SamplingParams

def of_llvm():
    count, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0][-1] != ":":
            inside = line.endswith("/libllvmlite.so")
        elif inside and line.startswith("Rss:"):
            count += 1024 * int(line.split()[1])
    return count

import llvmlite.binding, numba.core.registry
sizes = [of_llvm()]
with Engine.load(sys.argv[1], "cpu", threads=1) as engine:
    sizes.append(of_llvm())
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    tokens = engine.generate_tokens([1] * 520, params).finish().token_ids
    sizes.append(of_llvm())
    compiled = numba.njit(lambda x: x + 1)(41)
print(json.dumps([sizes, compiled, len(tokens)]))
"""


def test_only_mappings_without_written_pages_are_released() -> None:
    assert list(_unwritten(SMAPS.splitlines(), "libllvmlite.so")) == [
        (0x7F00000000, 0x7F00003000),
        (0x7F00003000, 0x7F00009000),
    ]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_llvm_is_not_in_memory_after_loading_and_a_whole_chunk_and_still_compiles(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tiny_geometry(max_positions=1024))
    (tmp_path / "compiled").symlink_to(home.compiled().resolve())
    command = [sys.executable, "-c", LOAD, str(path)]
    sizes, compiled, count = json.loads(run(command, env=environment(tmp_path), text=True, check=True).stdout)
    before, loaded, prompted = sizes
    assert max(loaded, prompted) < before / 4
    assert compiled == 42
    assert count == 4
