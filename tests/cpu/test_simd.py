"""Float16 to float32 on processors with and without an instruction for it."""

import platform
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from llvmlite import binding

from numba_atomflow.ops import simd, simd_columns
from numba_atomflow.ops.projection import project_tokens

X86 = platform.machine() in {"x86_64", "AMD64"}


@pytest.mark.parametrize("instruction", [True, False])
def test_every_float16(monkeypatch: pytest.MonkeyPatch, instruction: bool) -> None:
    if instruction and not simd.has_half_conversion(numba.core.registry.cpu_target.target_context.codegen()):
        pytest.skip("this processor has no instruction for it")
    monkeypatch.setattr(simd, "has_half_conversion", lambda _: instruction)

    @numba.njit
    def widen(bits: Any, out: Any) -> None:
        for i in range(bits.size):
            out[i] = simd.half_to_float(bits[i])

    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(bits.size, np.float32)
    widen(bits.view(np.int16), out)
    expected = bits.view(np.float16).astype(np.float32)
    expected.view(np.uint32)[np.isnan(expected)] |= 0x00400000  # the instruction makes a NaN quiet
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_float16_rows_without_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with it, for whole vectors and for what is left of a row."""
    monkeypatch.setattr(simd_columns, "has_half_conversion", lambda _: False)

    @numba.njit
    def multiply(weights: Any, x: Any, y: Any) -> None:
        for n in range(weights.shape[0]):
            simd_columns.multiply_row(weights, None, n, x, y, 2, False, 2)

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 151)).astype(np.float16).view(np.int16)
    x, y, expected = (rng.standard_normal((2, width)).astype(np.float32) for width in (151, 3, 3))
    multiply(weights, x, y)
    project_tokens(weights, None, x, expected, False)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.skipif(not X86, reason="names of x86 processors")
@pytest.mark.parametrize(
    ("name", "features", "has"),
    [
        ("x86-64", "", False),
        ("x86-64-v2", "", False),
        ("sandybridge", "", False),
        ("ivybridge", "", True),
        ("x86-64-v3", "", True),
        ("x86-64-v3", "-f16c", False),
        ("x86-64-v2", "+f16c,+avx", True),
    ],
)
def test_whether_a_processor_has_the_instruction(name: str, features: str, has: bool) -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features)
    codegen = SimpleNamespace(_tm=machine, magic_tuple=lambda: (target.triple, name, features))
    assert simd.has_half_conversion(codegen) is has
