"""Every GPU kernel compiled down to machine code for four architectures: no GPU, driver or toolkit is needed.

What is asked of the code: no spills, no stack, no local memory; weights come in 16-byte loads past the first-level
cache; no float64 that slipped in through NumPy's or numba's promotion rules. Registers are compared with those in
registers.json. A kernel takes numba 5 s per architecture, so that only one of each kind is compiled by default:
ATOMFLOW_EVERY_KERNEL=1 takes all, ATOMFLOW_RECORD_REGISTERS=1 also writes the file.
"""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", reason="the simulator replaces the compiler in this process"
)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if not (_is_there("nvidia.cu13") or _is_there("nvidia.cuda_nvcc")) or not _is_there("cuda.core"):
    pytest.skip("no CUDA compiler from pip: pip install 'numba-atomflow[cu13]'", allow_module_level=True)

from kernel_catalogue import CATALOGUE, HEAD_DIM, HEADS, KV_HEADS, Entry  # noqa: E402

ARCHITECTURES = ((8, 0), (8, 9), (9, 0), (12, 0))
REGISTERS = Path(__file__).with_name("registers.json")
RECORD = os.environ.get("ATOMFLOW_RECORD_REGISTERS") == "1"
EVERY = RECORD or os.environ.get("ATOMFLOW_EVERY_KERNEL") == "1"
ONE_OF_EACH = {
    "qkv x1",
    "gate_up x8",
    "vocabulary x1",
    f"attention {HEADS}/{KV_HEADS} of {HEAD_DIM} x1",
    "repack",
    "embedding",
    "argmax",
    "sample",
    "advance",
}
WEIGHT_LOAD = "ld.global.nc.L1::no_allocate.v4.u32"


def compile_for(entry: Entry, cc: tuple[int, int]) -> tuple[str, str, tuple[int, int]]:
    """PTX, what ptxas says about it, and the kernel's launch bounds."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    kernel = entry.build(cc >= (8, 9))
    bounds = kernel.targetoptions["launch_bounds"]
    ptx, _ = cuda.compile_ptx(kernel.py_func, entry.signature, cc=cc, launch_bounds=bounds)
    options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(ptx.encode()), options=options)
    linker.link("cubin")
    return ptx, linker.get_info_log(), bounds


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"ptxas does not say {pattern!r}:\n{text}"
    return int(found[1])


def recorded() -> dict[str, Any]:
    return json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}  # type: ignore[no-any-return]


@pytest.mark.parametrize("cc", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_machine_code(entry: Entry, cc: tuple[int, int]) -> None:
    if not EVERY and entry.name not in ONE_OF_EACH:
        pytest.skip("another kernel of its kind is compiled; ATOMFLOW_EVERY_KERNEL=1 takes all")
    ptx, log, (threads, blocks) = compile_for(entry, cc)
    registers = number(r"Used (\d+) registers", log)
    print(f"{entry.name}: {registers} registers")

    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert registers * threads * blocks <= 65536
    if not entry.doubles:
        arithmetic = re.findall(r"\b(?:add|sub|mul|div|fma|max|min|cvt\.f64)\S*\.f64\b.*|cvt\.rn\.f64\.\S+.*", ptx)
        assert not arithmetic, "float64 arithmetic"
    if entry.weights:
        assert ptx.count(WEIGHT_LOAD) >= 4
        assert ptx.count("L1::no_allocate") == ptx.count(WEIGHT_LOAD)
        assert "mma.sync.aligned.m16n8k16" in ptx
        assert ("e4m3x2" in ptx) == (cc >= (8, 9))

    table, architecture = recorded(), f"sm_{cc[0]}{cc[1]}"
    if RECORD:
        table.setdefault(entry.name, {})[architecture] = registers
        REGISTERS.write_text(json.dumps(table, indent=1) + "\n")
    else:
        assert registers <= 1.1 * table[entry.name][architecture], "many more registers than recorded"
