"""The persistent decode kernel on a GPU, at the shapes of tests/sim (checks: tests/support/persistent_cases.py)."""

import pytest
from device_launch import capability
from persistent_cases import CASES, CASES_OF_MANY_BLOCKS, PersistentCase, check_choosing, check_giving_up, check_ops


@pytest.fixture(autouse=True)
def _copy_engine() -> None:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")


@pytest.mark.parametrize("case", [*CASES, *CASES_OF_MANY_BLOCKS], ids=str)
def test_a_step_op_by_op_and_as_a_whole(case: PersistentCase) -> None:
    check_ops(case)


@pytest.mark.parametrize("case", CASES_OF_MANY_BLOCKS, ids=str)
def test_the_most_likely_token_is_handed_over_by_the_last_block(case: PersistentCase) -> None:
    check_choosing(case)


def test_a_block_does_not_wait_for_ever() -> None:
    check_giving_up(CASES[0])
