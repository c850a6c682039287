"""The GEMM kernels of sm_90 compiled to machine code: wgmma is asynchronous, and nothing leaves the registers."""

from typing import Any

import pytest
from machine_code import number, skip_without_compiler
from sass import operations

skip_without_compiler()

from numba_atomflow.ops.cuda.gemm import kernels  # noqa: E402
from numba_atomflow.ops.cuda.gemm.plan import gemm_plan  # noqa: E402
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles  # noqa: E402
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble_arch_specific  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402
from numba_atomflow.ops.formats import FP8_E4M3, WeightFormat  # noqa: E402

H200 = Chip(132, 232448, (9, 0))
HIDDEN, UNITS, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 3072, 8192, 24, 8, 128, 2048  # Llama 3.2 3B
FACTORIES: dict[str, tuple[Any, int, int, dict[str, Any]]] = {  # factory, rows, half, options
    "swiglu": (kernels.make_gemm_swiglu, 2 * UNITS, UNITS, {"intermediate": ActivationTiles(UNITS, TOKENS)}),
    "qkv": (
        kernels.make_gemm_qkv,
        (HEADS + 2 * KV_HEADS) * HEAD_DIM,
        HEAD_DIM // 2,
        {"heads": HEADS, "kv_heads": KV_HEADS},
    ),
}


@pytest.mark.parametrize(
    ("kind", "tile_tokens", "k_tile", "weights"),
    [
        ("swiglu", 256, 4, FP8_E4M3),  # the most registers between tiles
        pytest.param("qkv", 256, 4, FP8_E4M3, marks=pytest.mark.slow),  # and at their end
        pytest.param("swiglu", 64, 4, FP8_E4M3, marks=pytest.mark.slow),  # the fewest tokens with copied weights
        pytest.param("qkv", 16, 0, FP8_E4M3, marks=pytest.mark.slow),  # two CTAs share an SM
    ],
)
def test_machine_code(kind: str, tile_tokens: int, k_tile: int, weights: WeightFormat) -> None:
    factory, rows, half, options = FACTORIES[kind]
    layout = PrepackedLayout(rows, HIDDEN, half, weights, k_tile)
    plan = gemm_plan(layout, ActivationTiles(HIDDEN, TOKENS, weight_bits=weights.bits), tile_tokens, H200)
    spec = kernels.gemm_kernel("gemm", factory, plan, dependent=True, **options).spec
    assert spec.arch_specific
    assert spec.shared_bytes <= H200.shared_bytes
    code, log = assemble_arch_specific(spec.make(), spec, H200.capability)
    assert "C75" not in log, log  # setmaxnreg ignored, wgmma serialised, or waited for where the kernel does not
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert number(r"Used (\d+) registers", log) * spec.threads * plan.resident <= 65536

    found = operations(code)
    assert found.count("HGMMA") == 2 * 4  # two K blocks of four k-steps
    assert found.count("DEPBAR") == 2 + 1  # before either block of a unit, and at the end of a tile
    assert not {"STL", "LDL"} & set(found)
    if plan.copies_weights:  # a warp's four prepacked tiles in four pieces each, a warp's scales; no consumer copies
        assert found.count("LDGSTS") == 4 * 4 + 1
