"""Every GPU kernel in numba's CUDA simulator against its NumPy reference (the checks: tests/kernel_cases.py)."""

import pytest
from kernel_cases import (
    ATTENTIONS,
    LAYOUTS,
    PROJECTIONS,
    AttentionCase,
    FragmentLayout,
    ProjectionCase,
    check_attention,
    check_projection,
    check_repack,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repack(layout: FragmentLayout) -> None:
    check_repack(layout)


@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_projection(case: ProjectionCase) -> None:
    check_projection(case)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(case: AttentionCase) -> None:
    check_attention(case)
