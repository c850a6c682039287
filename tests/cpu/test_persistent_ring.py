"""The persistent kernel's ring as a model: copies that land in any order, warps that drift as far apart as they may.

A barrier's parity says whether the phase before is over, and no more; so a warp may take a slot for filled that is not,
if the slot's last chunk but one was the last to land. The model sees that for rings that are too short, and must not
see it for those that `PersistentShape` makes.
"""

import random
from dataclasses import dataclass, field

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numba_atomflow.ops.cuda.persistent.schedule import CONSUMERS, PersistentShape


@dataclass
class Ring:
    """Of so many slots, with so many copies under way at once; chunks are dealt to the warps in rounds."""

    slots: int
    in_flight: int
    chunks: int
    round_chunks: int
    landed: list[int] = field(default_factory=list)  # per slot: phases that are over
    freed: list[int] = field(default_factory=list)
    holds: list[int] = field(default_factory=list)  # the chunk whose bytes are there; -1 while a copy is under way

    def run(self, seed: int) -> bool:
        """Whether every warp got the chunk that it waited for, and all came to an end."""
        rng = random.Random(seed)
        self.landed, self.freed, self.holds = [0] * self.slots, [0] * self.slots, [-1] * self.slots
        asked, under_way, right = 0, [], True
        mine = [self._of_warp(warp) for warp in range(CONSUMERS)]
        done = [0] * CONSUMERS
        taken = 0
        while taken < self.chunks:
            moves = ["land"] * bool(under_way) + ["ask"] * self._may_ask(asked)
            ready = [warp for warp in range(CONSUMERS) if self._may_take(mine, done, warp, taken)]
            if not moves and not ready:
                return False  # stuck: a slot was given back before it was filled
            move = rng.choice(moves + ["take"] * (2 * bool(ready)))
            if move == "land":
                chunk = under_way.pop(rng.randrange(len(under_way)))
                self.holds[chunk % self.slots] = chunk
                self.landed[chunk % self.slots] += 1
            elif move == "ask":
                self.holds[asked % self.slots] = -1
                under_way.append(asked)
                asked += 1
            else:
                warp = rng.choice(ready)
                chunk = mine[warp][done[warp]]
                right &= self.holds[chunk % self.slots] == chunk
                self.freed[chunk % self.slots] += 1
                done[warp] += 1
                taken += 1
        return right

    def _of_warp(self, warp: int) -> list[int]:
        rounds = range(0, self.chunks, self.round_chunks)
        return [
            n for first in rounds for n in range(first + warp, min(first + self.round_chunks, self.chunks), CONSUMERS)
        ]

    def _may_ask(self, chunk: int) -> bool:
        """The slot has been given back, and the copy `in_flight` before has landed: both by parity, which also lets the
        first ones pass, whose phases before the first are over.
        """
        if chunk >= self.chunks:
            return False
        turn, old = chunk // self.slots, chunk - self.in_flight
        free = _over(self.freed[chunk % self.slots], turn - 1)
        return free and _over(self.landed[old % self.slots], old // self.slots)

    def _may_take(self, mine: list[list[int]], done: list[int], warp: int, taken: int) -> bool:
        """The warp has a chunk of the round that all are in, and the barrier says that it has landed."""
        if done[warp] == len(mine[warp]):
            return False
        chunk = mine[warp][done[warp]]
        in_round = taken // self.round_chunks == chunk // self.round_chunks
        return in_round and _over(self.landed[chunk % self.slots], chunk // self.slots)


def _over(phases: int, turn: int) -> bool:
    """What `mbarrier.try_wait.parity` says of the phase `turn` when so many are over."""
    return phases & 1 != turn & 1


SHIPPED = PersistentShape.in_flight


def wrong(slots: int, in_flight: int) -> int:
    """Runs of 60 in which a warp took something else than it waited for."""
    return sum(
        not Ring(slots, in_flight, 200, round_chunks).run(seed) for round_chunks in (1, 6, 18, 60) for seed in range(15)
    )


@pytest.mark.parametrize(
    ("slots", "in_flight"),
    [(CONSUMERS, SHIPPED), (CONSUMERS, 6), (CONSUMERS + SHIPPED, SHIPPED), (24, SHIPPED), (24, 24 - CONSUMERS)],
)
def test_rings_of_these_lengths_never_give_a_wrong_chunk(slots: int, in_flight: int) -> None:
    assert wrong(slots, in_flight) == 0


@pytest.mark.parametrize("slots", [CONSUMERS + 1, CONSUMERS + 2, CONSUMERS + 3])
def test_the_model_sees_rings_that_are_too_short(slots: int) -> None:
    assert wrong(slots, SHIPPED) > 0
