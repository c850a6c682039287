"""The persistent kernel for several columns in numba's CUDA simulator (the checks: tests/support/wide_cases.py)."""

import pytest
from wide_cases import CASES, CASES_OF_MANY_CTAS, WideCase, check_bits


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_have_the_bits_of_single_steps(case: WideCase) -> None:
    check_bits(case, [case.columns - 1])


@pytest.mark.slow
@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.parametrize("case", CASES_OF_MANY_CTAS, ids=str)
def test_columns_of_many_ctas(case: WideCase) -> None:
    check_bits(case, [case.columns - 1])
