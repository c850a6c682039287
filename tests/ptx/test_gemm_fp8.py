"""FP8 GEMM kernels compiled down to machine code for sm_90a: no GPU, driver or toolkit is needed."""

import pytest
from machine_code import number, skip_without_compiler
from sass import between, operations

skip_without_compiler()

from numba_atomflow.ops.cuda.gemm.kernels import (  # noqa: E402
    gemm_kernel,
    make_gemm_swiglu,
)
from numba_atomflow.ops.cuda.gemm.plan import choose_gemm_plan  # noqa: E402
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles  # noqa: E402
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble_arch_specific  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec  # noqa: E402

H200 = Chip(132, 232448, (9, 0))


def llama_3b(kind: str, tokens: int) -> KernelSpec:
    """A projection of Llama 3.2 3B in its bucket's tiling."""
    rows, in_features, half, factory, options = {
        "gate_up": (16384, 3072, 8192, make_gemm_swiglu, {"intermediate": ActivationTiles(8192, 2048)}),
    }[kind]
    layout = PrepackedLayout(rows, in_features, half, k_tile=4)
    plan = choose_gemm_plan(layout, ActivationTiles(in_features, 2048, 8), tokens, H200)
    assert plan.tile_tokens == min(tokens, 256)
    return gemm_kernel(kind, factory, plan, dependent=True, **options).spec


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [pytest.param("gate_up", 2048, marks=pytest.mark.slow)],
)
def test_machine_code(kind: str, tokens: int) -> None:
    spec = llama_3b(kind, tokens)
    assert spec.shared_bytes <= H200.shared_bytes
    code, log = assemble_arch_specific(spec.make(), spec, H200.capability)
    assert "C75" not in log, log  # setmaxnreg ignored, wgmma serialised
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    gaps = [len(part) for part in between(operations(code), "QGMMA", "QGMMA")]
    assert len(gaps) == 3 * (2 if tokens > 128 else 1)
    assert max(gaps) <= 4, gaps  # promotion must not come between the instructions of a pass
