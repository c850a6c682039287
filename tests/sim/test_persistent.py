"""The persistent decode kernel in numba's CUDA simulator (the checks: tests/support/persistent_cases.py)."""

from typing import Any

import pytest
from persistent_cases import (
    CASES,
    CASES_OF_MANY_CTAS,
    PersistentCase,
    check_greedy,
    check_ops,
    check_step,
    check_watchdog,
)

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent import kernel


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_op_by_op_and_as_a_whole(case: PersistentCase) -> None:
    check_ops(case)


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.parametrize("case", CASES_OF_MANY_CTAS, ids=str)
def test_a_step_of_many_ctas(case: PersistentCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is prefetched into L2 is copied later."""
    copied: list[tuple[int, int]] = []
    prefetched: list[tuple[int, int]] = []
    copy, prefetch = ptx.bulk_copy, ptx.bulk_prefetch_l2

    def recorded_copy(target: Any, at: int, source: Any, start: int, nbytes: int, *barrier: Any) -> None:
        copied.append((int(start), int(nbytes)))
        copy(target, at, source, start, nbytes, *barrier)

    def recorded_prefetch(source: Any, start: int, nbytes: int) -> None:
        prefetched.append((int(start), int(nbytes)))
        prefetch(source, start, nbytes)

    monkeypatch.setattr(ptx, "bulk_copy", recorded_copy)
    monkeypatch.setattr(ptx, "bulk_prefetch_l2", recorded_prefetch)
    check_step(case)
    assert set(prefetched) <= set(copied)
    assert prefetched or case.ffn < 1000  # there the pipeline is never full for long


@pytest.mark.slow
@pytest.mark.usefixtures("all_blocks_at_once")
def test_the_last_cta_posts_the_most_likely_token() -> None:
    check_greedy(CASES_OF_MANY_CTAS[1])


def test_the_watchdog_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SPIN_LIMIT", 3)
    check_watchdog(CASES[0])
