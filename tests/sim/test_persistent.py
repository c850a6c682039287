"""The persistent decode kernel in numba's CUDA simulator (the checks: tests/support/persistent_cases.py)."""

from typing import Any

import pytest
from persistent_cases import (
    CASES,
    CASES_OF_MANY_BLOCKS,
    PersistentCase,
    check_choosing,
    check_giving_up,
    check_ops,
    check_step,
)

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent import kernel


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_op_by_op_and_as_a_whole(case: PersistentCase) -> None:
    check_ops(case)


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("all_blocks_at_once")
@pytest.mark.parametrize("case", CASES_OF_MANY_BLOCKS, ids=str)
def test_a_step_of_many_blocks(case: PersistentCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is asked for ahead of its copy is copied later."""
    copied: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    copy, prefetch = ptx.bulk_copy, ptx.bulk_prefetch_l2

    def noted_copy(target: Any, at: int, source: Any, start: int, nbytes: int, *barrier: Any) -> None:
        copied.append((int(start), int(nbytes)))
        copy(target, at, source, start, nbytes, *barrier)

    def noted_prefetch(source: Any, start: int, nbytes: int) -> None:
        asked.append((int(start), int(nbytes)))
        prefetch(source, start, nbytes)

    monkeypatch.setattr(ptx, "bulk_copy", noted_copy)
    monkeypatch.setattr(ptx, "prefetch_bulk", noted_prefetch)
    check_step(case)
    assert set(asked) <= set(copied)
    assert asked or case.ffn < 1000  # there the ring is never full for long


@pytest.mark.slow
@pytest.mark.usefixtures("all_blocks_at_once")
def test_the_most_likely_token_is_handed_over_by_the_last_block() -> None:
    check_choosing(CASES_OF_MANY_BLOCKS[1])


def test_a_block_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PATIENCE", 3)
    check_giving_up(CASES[0])
