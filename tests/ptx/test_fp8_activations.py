"""Kernels that make FP8 activations compiled for the architectures that convert to FP8."""

import re

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from numba_atomflow.ops.cuda.layout.activations import ActivationTiles  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec  # noqa: E402
from numba_atomflow.ops.cuda.token.quantize_tiles import quantize_tiles_kernel  # noqa: E402
from numba_atomflow.ops.cuda.token.rms_norm import rms_norm_tiles_kernel  # noqa: E402

HALF, FP8 = ActivationTiles(3072, 2048), ActivationTiles(3072, 2048, 8)
KERNELS = {
    "quantize_tiles": quantize_tiles_kernel("quantize_tiles", HALF, FP8, dependent=True).spec,
    "rms_norm_fp8": rms_norm_tiles_kernel("rms_norm_fp8", FP8, 1e-5, dependent=True).spec,
}


@pytest.mark.parametrize("spec", KERNELS.values(), ids=KERNELS)
def test_machine_code(spec: KernelSpec) -> None:
    cc = (9, 0)
    ptx = make_ptx(spec.make(), spec, cc)
    _, log = assemble(ptx, cc)
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert number(r"Used (\d+) registers", log) <= 64  # four CTAs of 256 threads on an SM
    assert not re.search(r"\.local\b", ptx)
    assert not float64_arithmetic(ptx)
    assert "ld.global.v4" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
