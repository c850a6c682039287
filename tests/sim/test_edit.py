"""Edits by device functions in the simulator (checks: tests/support/edit_cases.py)."""

import pytest
from edit_cases import EDITS, EditCase, check_edit


@pytest.mark.parametrize("case", EDITS, ids=str)
def test_edit(case: EditCase) -> None:
    check_edit(case)
