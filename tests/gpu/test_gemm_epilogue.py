"""Epilogues of a GEMM by themselves: the checks of tests/sim on a GPU, and at the sizes of models."""

import pytest
from gemm_epilogue_cases import EPILOGUES, EpilogueCase, check_epilogue, qkv_case

LARGE_EPILOGUES = (
    EpilogueCase("add", 3072, 256, 128),
    EpilogueCase("swiglu", 16384, 256, 128),
    qkv_case(256, 128, 128, 24, 8, count=19),
    EpilogueCase("add", 3072, 512, 256, staged=True),
    qkv_case(512, 256, 128, 24, 8, count=300, staged=True),
)


@pytest.mark.parametrize("case", EPILOGUES + LARGE_EPILOGUES, ids=str)
def test_epilogue(case: EpilogueCase) -> None:
    check_epilogue(case)
