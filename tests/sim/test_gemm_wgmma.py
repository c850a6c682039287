"""The GEMM of sm_90 in the simulator, whose `wgmma` refuses a wrong order of work (checks: gemm_wgmma_cases.py)."""

import pytest
from gemm_wgmma_cases import WGMMAS, WgmmaCase, check_wgmma


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", WGMMAS, ids=str)
def test_gemm(case: WgmmaCase) -> None:
    check_wgmma(case)
