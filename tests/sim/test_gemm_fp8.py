"""The FP8 GEMM in numba's CUDA simulator (checks: tests/support/gemm_fp8_cases.py)."""

import gemm_fp8_cases
import pytest
from gemm_fp8_cases import GEMMS, Fp8GemmCase, check_gemm_fp8

from numba_atomflow.ops.cuda.gemm import wgmma_fp8
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout


@pytest.mark.parametrize(
    ("layout", "tokens", "most"),
    [
        (PrepackedLayout(128, 256), 16, 128),
        (PrepackedLayout(20, 640, k_tile=4), 16, 8),  # two passes; rows split, k-tiles of 4 groups and of 1
        (PrepackedLayout(100, 200), 16, 8),  # two passes; neither rows nor K fill a tile
    ],
    ids=["1", "2", "2, not full"],
)
def test_group_by_group(layout: PrepackedLayout, tokens: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In so many passes, which in a kernel have up to 128 tokens."""
    for module in (gemm_fp8_cases, wgmma_fp8):
        monkeypatch.setattr(module, "pass_tokens", lambda tokens: min(tokens, most))
    gemm_fp8_cases.check_group_products(layout, tokens)


@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_gemm(case: Fp8GemmCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wgmma_fp8, "pass_tokens", lambda tokens: tokens // case.passes)
    check_gemm_fp8(case)
