"""The paged kernels in numba's CUDA simulator (the checks: tests/paged_kernel_cases.py)."""

import pytest
from kernel_cases import ProjectionCase
from paged_kernel_cases import PAGED, PAGED_QKV, PagedCase, check_paged_attention, check_paged_qkv


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged_attention(case: PagedCase) -> None:
    check_paged_attention(case)


@pytest.mark.parametrize("case", PAGED_QKV, ids=str)
def test_paged_qkv(case: ProjectionCase) -> None:
    check_paged_qkv(case)
