"""The persistent decode kernel on a GPU, at the shapes of tests/sim (checks: tests/support/persistent_cases.py)."""

import pytest
from device_launch import capability
from persistent_cases import (
    CASES,
    CASES_OF_MANY_CTAS,
    LARGE_CASES,
    PersistentCase,
    check_greedy,
    check_ops,
    check_watchdog,
)


@pytest.fixture(autouse=True)
def _bulk_copies() -> None:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")


@pytest.mark.parametrize("case", [*CASES, *CASES_OF_MANY_CTAS, *LARGE_CASES], ids=str)
def test_a_step_op_by_op_and_as_a_whole(case: PersistentCase) -> None:
    check_ops(case)


@pytest.mark.parametrize("case", CASES_OF_MANY_CTAS, ids=str)
def test_the_last_cta_posts_the_most_likely_token(case: PersistentCase) -> None:
    check_greedy(case)


def test_the_watchdog_ends_a_wait() -> None:
    check_watchdog(CASES[0])
