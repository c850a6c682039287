"""Every GPU kernel in numba's CUDA simulator against its NumPy reference (the checks: tests/kernel_cases.py)."""

import pytest
from kernel_cases import LAYOUTS, PROJECTIONS, check_projection, check_repack


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_repack(layout):
    check_repack(layout)


@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_projection(case):
    check_projection(case)
