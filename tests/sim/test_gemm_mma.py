"""The GEMM with mma.sync in numba's CUDA simulator (checks: gemm_wgmma_cases.py)."""

import pytest
from gemm_mma_cases import MMAS, check_mma
from gemm_wgmma_cases import WgmmaCase


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", MMAS, ids=str)
def test_gemm(case: WgmmaCase) -> None:
    check_mma(case)
