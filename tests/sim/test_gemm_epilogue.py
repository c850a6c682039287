"""Epilogues of GEMM kernels in numba's CUDA simulator (checks: tests/support/gemm_epilogue_cases.py)."""

import pytest
from gemm_epilogue_cases import EPILOGUES, EpilogueCase, check_epilogue


@pytest.mark.parametrize("case", EPILOGUES, ids=str)
def test_epilogue(case: EpilogueCase) -> None:
    check_epilogue(case)
