"""A model of the persistent kernel's pipeline: copies arrive in any order, warps drift as far apart as they may.

The parity of an mbarrier says whether the phase before is complete, and no more; so a warp may take a stage for full
that is not, if the last k-tile but one of the stage was the last to arrive. The model shows that for pipelines that are
too short, and must not show it for those of `PersistentShape`.
"""

import random
from dataclasses import dataclass, field

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numba_atomflow.ops.cuda.persistent.schedule import CONSUMER_WARPS, PersistentShape


@dataclass
class Pipeline:
    """With so many stages and copies in flight; the k-tiles of a round go to the warps in turn."""

    stages: int
    copies_in_flight: int
    k_tiles: int
    round_k_tiles: int
    full: list[int] = field(default_factory=list)  # per stage: completed phases of its full and of its empty barrier
    empty: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)  # the k-tile whose bytes are there; -1 during a copy

    def run(self, seed: int) -> bool:
        """Whether every warp read the k-tile that it waited for, and all k-tiles were consumed."""
        rng = random.Random(seed)
        self.full, self.empty, self.holds = [0] * self.stages, [0] * self.stages, [-1] * self.stages
        issued, under_way, right = 0, [], True
        mine = [self._of_warp(warp) for warp in range(CONSUMER_WARPS)]
        done = [0] * CONSUMER_WARPS
        consumed = 0
        while consumed < self.k_tiles:
            moves = ["arrive"] * bool(under_way) + ["issue"] * self._may_issue(issued)
            ready = [warp for warp in range(CONSUMER_WARPS) if self._may_consume(mine, done, warp, consumed)]
            if not moves and not ready:
                return False  # deadlock: a stage was released before it was full
            move = rng.choice(moves + ["consume"] * (2 * bool(ready)))
            if move == "arrive":
                k_tile = under_way.pop(rng.randrange(len(under_way)))
                self.holds[k_tile % self.stages] = k_tile
                self.full[k_tile % self.stages] += 1
            elif move == "issue":
                self.holds[issued % self.stages] = -1
                under_way.append(issued)
                issued += 1
            else:
                warp = rng.choice(ready)
                k_tile = mine[warp][done[warp]]
                right &= self.holds[k_tile % self.stages] == k_tile
                self.empty[k_tile % self.stages] += 1
                done[warp] += 1
                consumed += 1
        return right

    def _of_warp(self, warp: int) -> list[int]:
        rounds = range(0, self.k_tiles, self.round_k_tiles)
        return [
            n
            for first in rounds
            for n in range(first + warp, min(first + self.round_k_tiles, self.k_tiles), CONSUMER_WARPS)
        ]

    def _may_issue(self, k_tile: int) -> bool:
        """The stage is empty, and the copy `copies_in_flight` before is complete: both by parity, which also lets the
        first ones pass, as the phases before the first count as complete.
        """
        if k_tile >= self.k_tiles:
            return False
        phase, oldest = k_tile // self.stages, k_tile - self.copies_in_flight
        empty = _over(self.empty[k_tile % self.stages], phase - 1)
        return empty and _over(self.full[oldest % self.stages], oldest // self.stages)

    def _may_consume(self, mine: list[list[int]], done: list[int], warp: int, consumed: int) -> bool:
        """The warp has a k-tile of the current round, and the full barrier says that it has arrived."""
        if done[warp] == len(mine[warp]):
            return False
        k_tile = mine[warp][done[warp]]
        in_round = consumed // self.round_k_tiles == k_tile // self.round_k_tiles
        return in_round and _over(self.full[k_tile % self.stages], k_tile // self.stages)


def _over(completed: int, phase: int) -> bool:
    """Result of `mbarrier.try_wait.parity` for a phase when so many are complete."""
    return completed & 1 != phase & 1


SHIPPED = PersistentShape.copies_in_flight


def wrong(stages: int, copies_in_flight: int) -> int:
    """Runs of 60 in which a warp read something else than it waited for."""
    return sum(
        not Pipeline(stages, copies_in_flight, 200, round_k_tiles).run(seed)
        for round_k_tiles in (1, 6, 18, 60)
        for seed in range(15)
    )


@pytest.mark.parametrize(
    ("stages", "copies_in_flight"),
    [
        (CONSUMER_WARPS, SHIPPED),
        (CONSUMER_WARPS, 6),
        (CONSUMER_WARPS + SHIPPED, SHIPPED),
        (24, SHIPPED),
        (24, 24 - CONSUMER_WARPS),
    ],
)
def test_pipelines_of_these_lengths_never_give_a_wrong_k_tile(stages: int, copies_in_flight: int) -> None:
    assert wrong(stages, copies_in_flight) == 0


@pytest.mark.parametrize("stages", [CONSUMER_WARPS + 1, CONSUMER_WARPS + 2, CONSUMER_WARPS + 3])
def test_the_model_shows_pipelines_that_are_too_short(stages: int) -> None:
    assert wrong(stages, SHIPPED) > 0
