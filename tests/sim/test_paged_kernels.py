"""The paged kernels in numba's CUDA simulator (the checks: tests/support/paged_kernel_cases.py)."""

import pytest
from kernel_cases import ProjectionCase, check_projection
from paged_kernel_cases import (
    COPIES,
    PAGED,
    PAGED_QKV,
    CopyCase,
    PagedCase,
    check_copy_blocks,
    check_paged_attention,
    check_paged_qkv,
)


@pytest.mark.parametrize("case", PAGED, ids=str)
def test_paged_attention(case: PagedCase) -> None:
    check_paged_attention(case)


@pytest.mark.parametrize("case", PAGED_QKV, ids=str)
def test_paged_qkv(case: ProjectionCase) -> None:
    check_paged_qkv(case)


@pytest.mark.parametrize("case", COPIES, ids=str)
def test_a_sequences_keys_and_values_leave_and_enter_kv_blocks(case: CopyCase) -> None:
    check_copy_blocks(case)


def test_a_cta_of_sixteen_warps() -> None:
    """The plan of a step of eight tokens where x leaves shared memory for one CTA per SM."""
    check_projection(ProjectionCase("add", 40, 520, 8, warps=16, split_k=4, groups_in_flight=1))
