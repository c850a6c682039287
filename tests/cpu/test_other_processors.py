"""Processors that this machine is not: older ones run the same code without its instructions, Arm's compile it."""

import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
from child_processes import run
from cli_runner import environment
from llvmlite import binding
from numba.core.codegen import JITCodeLibrary
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.host import pool_code
from numba_atomflow.memory import fault_handler
from numba_atomflow.ops import attention, jit, projection

X86 = platform.machine() in {"x86_64", "AMD64"}

# --- older processors: numba compiles for the one that its settings name ---------------------------------------------

OLD_PROCESSOR = """
import json, re, sys
from numba_atomflow import Engine
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops import jit
with Engine.random(ModelGeometry.from_dict(json.loads(sys.argv[1])), "cpu", 64, threads=1) as engine:
    logits = [engine.feed(tokens).tolist() for tokens in json.loads(sys.argv[2])]
code = "".join(result.library.get_asm_str() for kernel in jit._kernels for result in kernel.overloads.values())
newer = sorted(set(re.findall(r"^\\s+(v[a-z]+[0-9a-z]*)\\s.*%[xyz]mm", code, re.MULTILINE)))
print(json.dumps({"logits": logits, "bytes": len(code), "newer": newer}))
"""
STEPS = [[5], [6], [7]]


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="names of x86 processors")
def test_an_engine_on_a_processor_without_avx_fma_and_f16c(tmp_path: Path) -> None:
    """It runs, with the logits of this processor and none of its newer instructions."""
    geometry = tiny_geometry()
    with Engine.random(geometry, "cpu", 64, threads=1) as engine:
        expected = [engine.feed(tokens) for tokens in STEPS]
    settings = environment(tmp_path, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="+sse2")
    command = [sys.executable, "-c", OLD_PROCESSOR, json.dumps(geometry.to_dict()), json.dumps(STEPS)]
    answer = json.loads(run(command, env=settings, check=True).stdout)
    assert answer["bytes"] > 100_000
    assert answer["newer"] == []
    np.testing.assert_allclose(answer["logits"], expected, rtol=1e-4, atol=1e-5)


# --- Arm: kernels are compiled, not run ------------------------------------------------------------------------------

ARM = "aarch64-unknown-linux-gnu"


def compiled_for_arm(code: str) -> str:
    """A module of LLVM's language as assembly language of a 64-bit Arm processor with no options."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    machine = binding.Target.from_triple(ARM).create_target_machine(cpu="generic", opt=3)
    module = binding.parse_assembly(re.sub(r"^target .*$", "", code, flags=re.MULTILINE))
    module.triple, module.data_layout = ARM, str(machine.target_data)
    assembly: str = machine.emit_assembly(module)
    return assembly


@pytest.fixture
def code_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """A function that compiles a kernel anew and returns its module as it is before it meets this processor."""
    modules: list[str] = []
    optimize = JITCodeLibrary._optimize_final_module

    def record(library: Any) -> None:
        modules.append(str(library._final_module))
        optimize(library)

    monkeypatch.setattr(JITCodeLibrary, "_optimize_final_module", record)

    def code(kernel: Any, *types: Any) -> str:
        numba.njit(parallel=True, pipeline_class=jit._KernelCompiler)(kernel.py_func).compile(types)
        # numba's counting of references was compiled for this processor before; it is no part of the kernel.
        body = re.compile(r"^(define [^\n]*@NRT_decref\([^\n]*\{\n).*?^\}", re.MULTILINE | re.DOTALL)
        counted = re.compile(r"^declare i8 @llvm\.x86\.atomic.*$", re.MULTILINE)
        return counted.sub("", body.sub(r"\1  unreachable\n}", modules[-1]))

    return code


MATRIX = numba.float32[:, ::1]
PROJECTION = (MATRIX, MATRIX, numba.boolean)
ATTENTION = (numba.int64[::1], numba.int64, numba.int64, numba.float32, numba.float32[:, :, ::1], MATRIX)


@pytest.mark.parametrize(
    ("kernel", "types"),
    [
        (projection.project_token, (numba.int8[:, ::1], MATRIX, *PROJECTION)),
        pytest.param(projection.project_token, (numba.int16[:, ::1], numba.none, *PROJECTION), marks=pytest.mark.slow),
        pytest.param(attention.attend_tokens, (MATRIX, MATRIX, MATRIX, *ATTENTION), marks=pytest.mark.slow),
    ],
)
def test_a_kernel_has_nothing_of_x86_and_becomes_neon(
    code_of: Callable[..., str], kernel: Any, types: tuple[Any, ...]
) -> None:
    code = code_of(kernel, *types)
    assert "llvm.x86" not in code
    assembly = compiled_for_arm(code)
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", assembly)) > 20
    assert not re.findall(r"\bbl\s+__(?:extendhf|gnu_h2f)\w*", assembly), "a run-time library converts float16"


@contextmanager
def imported_on_arm(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Iterator[ModuleType]:
    """A second copy of a module, imported as if this were an Arm machine."""
    assert module.__file__ is not None
    spec = spec_from_file_location("on_arm", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        spec.loader.exec_module(copy)
        yield copy


def test_thread_pool_and_fault_handler_are_compiled_for_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    with imported_on_arm(monkeypatch, pool_code) as copy:
        assert "x86" not in copy.CODE
        pool = compiled_for_arm(copy.CODE)
    assert re.search(r"\bmov\s+w0, #98\b", pool), "the number of Arm's system call futex"
    assert re.search(r"^\s+yield$", pool, re.MULTILINE)
    with imported_on_arm(monkeypatch, fault_handler) as copy:
        assert "handler:" in compiled_for_arm(copy._CODE)
