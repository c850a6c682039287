"""Helpers for tests of compiled kernels: compiler detection, its log, and recorded register counts."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

REGISTERS = Path(__file__).parents[1] / "ptx" / "registers.json"
RECORD = os.environ.get("ATOMFLOW_RECORD_REGISTERS") == "1"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def skip_without_compiler() -> None:
    """Skip the importing module if there is no CUDA compiler."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("the simulator replaces the compiler in this process", allow_module_level=True)
    if not (_is_installed("nvidia.cu13") or _is_installed("nvidia.cuda_nvcc")) or not _is_installed("cuda.core"):
        pytest.skip("no CUDA compiler from pip: pip install 'numba-atomflow[cu13]'", allow_module_level=True)


def number(pattern: str, text: str) -> int:
    """A number in the assembler's log."""
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in the log of ptxas:\n{text}"
    return int(match[1])


def float64_arithmetic(ptx: str) -> list[str]:
    """float64 instructions, which NumPy's or numba's promotion rules may introduce."""
    return re.findall(r"\b(?:add|sub|mul|div|fma|max|min|cvt\.f64)\S*\.f64\b.*|cvt\.rn\.f64\.\S+.*", ptx)


def check_registers(name: str, capability: tuple[int, int], registers: int) -> None:
    """At most 10 % more registers than recorded; ATOMFLOW_RECORD_REGISTERS=1 records them."""
    table: dict[str, Any] = json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}
    architecture = "sm_{}{}".format(*capability)
    if RECORD:
        table.setdefault(name, {})[architecture] = registers
        REGISTERS.write_text(json.dumps(table, indent=1) + "\n")
    else:
        assert registers <= 1.1 * table[name][architecture], "many more registers than recorded"
