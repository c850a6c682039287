"""The FP8 GEMM in numba's CUDA simulator (checks: tests/support/gemm_fp8_cases.py)."""

import pytest
from gemm_fp8_cases import GEMMS, Fp8GemmCase, check_gemm_fp8, check_multiply_group

from numba_atomflow.ops.cuda.gemm.wgmma_fp8 import Passes
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout


@pytest.mark.parametrize(
    ("layout", "passes"),
    [
        (PrepackedLayout(128, 256), Passes(16, 1, 1)),
        (PrepackedLayout(100, 200), Passes(8, 2, 1)),  # neither rows nor K fill a tile
        (PrepackedLayout(20, 640, k_tile=4), Passes(8, 2, 2)),  # rows split, k-tiles of 4 groups and of 1
        (PrepackedLayout(128, 128), Passes(8, 4, 1)),
        (PrepackedLayout(128, 128), Passes(8, 4, 2)),
    ],
    ids=["one pass", "padded", "two sets", "four passes", "four passes, two sets"],
)
def test_group_by_group(layout: PrepackedLayout, passes: Passes) -> None:
    check_multiply_group(layout, passes)


@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_gemm(case: Fp8GemmCase) -> None:
    check_gemm_fp8(case)
