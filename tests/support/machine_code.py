"""What tests of compiled kernels share: whether there is a compiler, what it says, and registers of earlier times."""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

REGISTERS = Path(__file__).parents[1] / "ptx" / "registers.json"
RECORD = os.environ.get("ATOMFLOW_RECORD_REGISTERS") == "1"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def skip_without_compiler() -> None:
    """Skip the module that is being imported."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("the simulator replaces the compiler in this process", allow_module_level=True)
    if not (_is_there("nvidia.cu13") or _is_there("nvidia.cuda_nvcc")) or not _is_there("cuda.core"):
        pytest.skip("no CUDA compiler from pip: pip install 'numba-atomflow[cu13]'", allow_module_level=True)


def number(pattern: str, text: str) -> int:
    """What the assembler's log says about something."""
    found = re.search(pattern, text)
    assert found, f"ptxas does not say {pattern!r}:\n{text}"
    return int(found[1])


def float64_arithmetic(ptx: str) -> list[str]:
    """Instructions that NumPy's or numba's promotion rules may have brought in."""
    return re.findall(r"\b(?:add|sub|mul|div|fma|max|min|cvt\.f64)\S*\.f64\b.*|cvt\.rn\.f64\.\S+.*", ptx)


def check_registers(name: str, capability: tuple[int, int], registers: int) -> None:
    """Not many more than recorded; with ATOMFLOW_RECORD_REGISTERS=1 they are recorded."""
    table: dict[str, Any] = json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}
    architecture = "sm_{}{}".format(*capability)
    if RECORD:
        table.setdefault(name, {})[architecture] = registers
        REGISTERS.write_text(json.dumps(table, indent=1) + "\n")
    else:
        assert registers <= 1.1 * table[name][architecture], "many more registers than recorded"
