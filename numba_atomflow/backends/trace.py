"""A traced decode step: when each CTA did what, and where the time of the ops goes.

An op ends when the last of its CTAs is done, and its time is counted from the end of the op before. So the times of the
ops add up to the step's, and the phases of an op, each the mean over all CTAs, to the op's: nothing is counted twice,
although CTAs start an op while others still run the one before.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PhaseRow:
    """Where the time of all ops of one kind goes: seconds of a CTA per op, the mean over CTAs and layers.

    Attributes:
        count: ops per step.
        staging_seconds: until the op's input is in shared memory, from the end of the op before.
        copy_wait_seconds: wait for weights, as measured by the first warp of the CTA.
        compute_seconds: from then on to the CTA's last result, without the wait for weights.
        barrier_seconds: from the CTA's last result (without work in the op: from its start) to that of the slowest CTA.
    """

    kind: str
    count: int
    staging_seconds: float
    copy_wait_seconds: float
    compute_seconds: float
    barrier_seconds: float

    @property
    def seconds(self) -> float:
        """Time of one op: the sum of its phases."""
        return self.staging_seconds + self.copy_wait_seconds + self.compute_seconds + self.barrier_seconds


@dataclass(frozen=True)
class StepTrace:
    """Times of one traced step, float64 [CTAs, ops], in nanoseconds since its first CTA started.

    NaN where a CTA has no work in an op or no such event, and for op 0, the embedding, which ends when the last CTA
    starts op 1.

    Attributes:
        names: of the ops, in order.
        begun: the CTA starts the op. staged: its input is in shared memory. done: its results are published.
        copy_begun, copy_done: the first and the last copy of its weights are issued.
        waited: duration of the CTA's wait for weights.
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
            raise ValueError(f"times of {len(self.names)} ops must all be [CTAs, ops]")

    @cached_property
    def ends(self) -> NDArray[np.float64]:
        """Nanoseconds [ops] at which each op's last CTA is done."""
        ends = np.fmax.reduce(self.done, axis=0)
        ends[0] = np.fmax.reduce(self.begun[:, 1])
        return np.maximum.accumulate(ends)

    @property
    def op_seconds(self) -> list[float]:
        """Time of each op."""
        return (np.diff(self.ends, prepend=0) / 1e9).tolist()  # type: ignore[no-any-return]

    def phases(self) -> list[PhaseRow]:
        """Where the time goes, by kind of op, in the order of their first op; the embedding has no phases."""
        start, end = self.ends[:-1], self.ends[1:]  # of op 1 and later ops
        staged = np.fmax(self.staged[:, 1:], start)  # earlier time is part of the op before
        has_work = ~np.isnan(self.staged[:, 1:])
        done = np.where(has_work, np.fmax(self.done[:, 1:], staged), start)
        waited = np.fmin(np.nan_to_num(self.waited[:, 1:]), done - staged)
        parts = np.array([staged - start, waited, done - staged - waited, end - done]).mean(axis=1) / 1e9
        kinds: dict[str, list[int]] = {}
        for op, name in enumerate(self.names[1:]):
            kinds.setdefault(name.rpartition(".")[2], []).append(op)
        return [PhaseRow(kind, len(ops), *parts[:, ops].mean(axis=1).tolist()) for kind, ops in kinds.items()]
