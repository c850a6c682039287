"""When each block of a traced decode step did what, and where the time of its ops goes.

An op ends when the last of its blocks is done, and what it adds to the step begins where the op before it ended. So
ops add up to the step, and the phases of an op, each the mean over all blocks, to the op: nothing is counted twice,
although blocks turn to an op while others are still busy with the one before.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PhaseRow:
    """Where the time of all ops of one kind goes: seconds of a block per op, the mean over blocks and layers.

    Attributes:
        count: ops per step.
        staging_seconds: until what the op reads is in the block, counted from the end of the op before.
        copy_wait_seconds: waiting for weights, as the first warp of the block notes it.
        compute_seconds: from there to the block's last result, without the wait for weights.
        barrier_seconds: from the block's last result (of one without a share in the op: from the op's begin) to that of
            the slowest.
    """

    kind: str
    count: int
    staging_seconds: float
    copy_wait_seconds: float
    compute_seconds: float
    barrier_seconds: float

    @property
    def seconds(self) -> float:
        """What one op adds to the step: the sum of its phases."""
        return self.staging_seconds + self.copy_wait_seconds + self.compute_seconds + self.barrier_seconds


@dataclass(frozen=True)
class StepTrace:
    """Times of one traced step, float64 [blocks, ops], in nanoseconds since its first block began.

    NaN where a block has no share in an op or does nothing of the kind, and for op 0, the embedding, which is over when
    the last block turns to op 1.

    Attributes:
        names: of the ops, in order.
        begun: the block turns to the op. staged: what it reads is there. done: its results are published.
        copy_begun, copy_done: the first and the last of its weights are asked for.
        waited: how long the block waited for weights.
    """

    names: tuple[str, ...]
    begun: NDArray[np.float64]
    staged: NDArray[np.float64]
    done: NDArray[np.float64]
    copy_begun: NDArray[np.float64]
    copy_done: NDArray[np.float64]
    waited: NDArray[np.float64]

    def __post_init__(self) -> None:
        shapes = {getattr(self, field.name).shape for field in fields(self) if field.name != "names"}
        if len(shapes) != 1 or shapes.pop()[1:] != (len(self.names),):
            raise ValueError(f"times of {len(self.names)} ops must all be [blocks, ops]")

    @cached_property
    def ends(self) -> NDArray[np.float64]:
        """Nanoseconds [ops] at which each op's last block is done."""
        ends = np.fmax.reduce(self.done, axis=0)
        ends[0] = np.fmax.reduce(self.begun[:, 1])
        return np.maximum.accumulate(ends)

    @property
    def op_seconds(self) -> list[float]:
        """What each op adds to the step."""
        return (np.diff(self.ends, prepend=0) / 1e9).tolist()  # type: ignore[no-any-return]

    def phases(self) -> list[PhaseRow]:
        """Where the time goes, by kind of op, in the order of their first op; the embedding has no phases."""
        start, end = self.ends[:-1], self.ends[1:]  # of op 1 and later ops
        staged = np.fmax(self.staged[:, 1:], start)  # what came before is part of the op before
        shares = ~np.isnan(self.staged[:, 1:])
        done = np.where(shares, np.fmax(self.done[:, 1:], staged), start)
        waited = np.fmin(np.nan_to_num(self.waited[:, 1:]), done - staged)
        parts = np.array([staged - start, waited, done - staged - waited, end - done]).mean(axis=1) / 1e9
        kinds: dict[str, list[int]] = {}
        for op, name in enumerate(self.names[1:]):
            kinds.setdefault(name.rpartition(".")[2], []).append(op)
        return [PhaseRow(kind, len(ops), *parts[:, ops].mean(axis=1).tolist()) for kind, ops in kinds.items()]
