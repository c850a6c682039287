"""Few modules touch the compilers' extension APIs, and only the GPU's own modules import numba.cuda."""

import re
from pathlib import Path

OPS = Path(__file__).resolve().parents[2] / "ops"


def files_that_say(pattern: str) -> set[str]:
    return {str(path.relative_to(OPS)) for path in OPS.rglob("*.py") if re.search(pattern, path.read_text())}


def test_the_extension_apis_are_used_for_instructions_alone() -> None:
    """On the GPU in one module, on the CPU in those named `simd`."""
    users = files_that_say(r"llvmlite import ir|numba(\.cuda)?\.extending|InlineAsm")
    assert {name for name in users if not name.startswith("simd")} == {"ptx/core.py"}
    assert "simd.py" in users


def test_only_the_gpu_modules_import_numba_cuda() -> None:
    importers = files_that_say(r"(?m)^from numba import .*\bcuda\b|^import numba\.cuda|^from numba\.cuda")
    assert {"ptx/core.py", "cuda/gemv/kernels.py", "cuda/persistent/kernel.py"} <= importers
    assert all(name.startswith(("ptx/", "cuda/")) for name in importers)
