"""The GEMM of sm_90 in the simulator, whose `wgmma` refuses a wrong order of work (checks: gemm_wgmma_cases.py)."""

from typing import Any

import numpy as np
import pytest
import simulated_lanes
from gemm_wgmma_cases import COPIED, WGMMAS, WgmmaCase, check_wgmma

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm import plan

WITH_TURNS = WgmmaCase("add", 20, 500, plan.COPIED_FROM)  # warpgroups take turns in tiles of so many tokens


def weights_are_copied(case: WgmmaCase, copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By other warps, or by the consumers: whatever the number of tokens of a tile."""
    monkeypatch.setattr(plan, "COPIED_FROM", case.tile_tokens + (not copied))
    assert case.plan.copies_weights == copied


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", WGMMAS, ids=str)
def test_gemm(case: WgmmaCase) -> None:
    assert not case.plan.copies_weights
    check_wgmma(case)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [WITH_TURNS, *COPIED, *(case for case in WGMMAS if case.format.bits == 8)], ids=str)
def test_copied_weights_give_the_same_bits_as_the_ring(case: WgmmaCase, monkeypatch: pytest.MonkeyPatch) -> None:
    weights_are_copied(case, True, monkeypatch)
    copied = check_wgmma(case)
    weights_are_copied(case, False, monkeypatch)
    np.testing.assert_array_equal(copied.view(np.uint8), check_wgmma(case).view(np.uint8))


@pytest.mark.parametrize("copied", [True, False])
def test_weights_are_copied_before_the_previous_kernel_has_ended(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when all slots of the ring have been filled."""
    case, copies = COPIED[0], 0
    weights_are_copied(case, copied, monkeypatch)
    start, in_ring = ptx.copy_async_16, case.plan.ring * 128 * 128 // 16

    def copy(*arguments: Any) -> None:
        nonlocal copies
        copies += 1
        start(*arguments)

    def previous_kernel_ends() -> None:
        for _ in range(1000):
            if copies >= in_ring:
                return
            simulated_lanes.TIME.sleep(0)
        raise AssertionError(f"{copies} of {in_ring} copies were started")

    monkeypatch.setattr(ptx, "copy_async_16", copy)
    monkeypatch.setattr(ptx, "wait_for_previous_kernel", previous_kernel_ends)
    check_wgmma(case, dependent=True)
