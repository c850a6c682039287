"""The persistent decode kernel in numba's CUDA simulator (the checks: tests/persistent_cases.py)."""

import pytest
from persistent_cases import CASES, PersistentCase, check_giving_up, check_step

from numba_atomflow.ops.cuda.persistent import kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step(case: PersistentCase) -> None:
    check_step(case)


def test_a_block_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PATIENCE", 3)
    check_giving_up(CASES[0])
