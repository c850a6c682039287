"""The persistent decode kernel in numba's CUDA simulator (the checks: tests/persistent_cases.py)."""

import pytest
from persistent_cases import CASES, CASES_OF_MANY_BLOCKS, PersistentCase, check_giving_up, check_ops, check_step

from numba_atomflow.ops.cuda.persistent import kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_op_by_op_and_as_a_whole(case: PersistentCase) -> None:
    check_ops(case)


@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.parametrize("case", CASES_OF_MANY_BLOCKS, ids=str)
def test_a_step_of_many_blocks(case: PersistentCase) -> None:
    check_step(case)


def test_a_block_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PATIENCE", 3)
    check_giving_up(CASES[0])
