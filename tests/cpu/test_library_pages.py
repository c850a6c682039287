"""Pages of libraries leave the process once kernels are loaded, and come back when it compiles again."""

import json
import sys
from pathlib import Path

import pytest
from child_processes import run
from cli_runner import environment
from tiny_models import tiny_geometry, write_checkpoint

from numba_atomflow import Engine, home
from numba_atomflow.backends.cpu import backend
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
7f0000d000-7f0000e000 r--s 00000000 fe:00 5325272                    /lib/libcrypto.so.3
Anonymous:             0 kB
7f0000e000-7f0000f000 r--p 00000000 fe:00 5325273                    /models/model.safetensors
Anonymous:             0 kB
7f0000f000-7f00010000 r--p 00000000 fe:00 5325274                    /plugins/libcounter.so
Anonymous:             0 kB
7f00010000-7f00011000 r-xp 00000000 fe:00 5325275                    /np/_umath.cpython-311-x86_64-linux-gnu.so
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
    tokens = engine.generate_tokens([1] * 512, params).finish().token_ids
    sizes.append(of_llvm())
    compiled = numba.njit(lambda x: x + 1)(41)
print(json.dumps([sizes, compiled, len(tokens)]))
"""


def test_only_mappings_of_libraries_without_written_pages_are_released() -> None:
    assert list(_unwritten(SMAPS.splitlines(keepends=True))) == [
        (0x7F00000000, 0x7F00003000),
        (0x7F00003000, 0x7F00009000),
        (0x7F0000B000, 0x7F0000C000),
        (0x7F00010000, 0x7F00011000),
    ]


@pytest.mark.parametrize(
    ("name", "is_released"),
    [
        ("libpython3.11.so.1.0", True),
        ("libstdc++.so.6.0.30", True),
        ("libscipy_openblas64_-32a4b2a6.so", True),
        ("libm.so.6", True),
        ("tokenizers.abi3.so", True),
        ("libmath.so", False),
        ("libcuda.so.1", False),
        ("mylibc.so.6", False),
    ],
)
def test_only_libraries_that_are_never_unloaded_are_released(name: str, is_released: bool) -> None:
    smaps = [f"7f00000000-7f00003000 r-xp 00000000 fe:00 1   /folder/{name}\n", "Anonymous:    0 kB\n"]
    assert bool(list(_unwritten(smaps))) == is_released


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


@pytest.mark.parametrize("layers", [1, 3])
def test_pages_are_released_after_the_first_layer_of_the_first_whole_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    path = write_checkpoint(tmp_path, tiny_geometry(layers=layers))
    events: list[int | str] = []
    run_actions = backend.CpuBackend._run

    def record(self: backend.CpuBackend, actions: list[backend.Action]) -> None:
        events.append(len(actions))
        run_actions(self, actions)

    monkeypatch.setattr(backend.CpuBackend, "_run", record)
    monkeypatch.setattr(backend, "release_library_pages", lambda: events.append("released"))
    with Engine.load(path, "cpu", max_seq_len=64, threads=1) as engine:
        assert events == ["released"]
        events.clear()
        once = engine.feed([1] * 64)
        first, released, rest, *logits = events
        assert released == "released"
        assert first == 6 if layers > 1 else rest == 0  # the embedding; Qkv, Attention, ProjectAdd, GateUp, ProjectAdd
        engine.reset()
        events.clear()
        again = engine.feed([1] * 64)
        assert events == [first + rest, *logits]
        assert again.tobytes() == once.tobytes()
