"""One picture of a step on several GPUs: the clock of each is set by what cannot have come before its cause.

GPUs' timers have different zeros. A CTA has staged its input when it has the last result of the op before, of every
rank. So in each exchange rank b stages after rank a is done, and rank a after rank b. The smallest distance in each
direction is the least time that a word takes, plus or minus the offset of the clocks: the offset is half of the
difference of the two distances, the time of a word half of their sum.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.cuda.persistent.schedule import ATTENTION, OPS_PER_LAYER
from numba_atomflow.ops.cuda.persistent.trace import DONE, STAGED, WAITED

Times = NDArray[np.float64]  # [CTAs, ops, EVENTS]: nanoseconds by a rank's own clock


class Clock(NamedTuple):
    """Nanoseconds that a rank's clock is ahead of another one's, and that a word takes between them at least."""

    ahead: float
    latency: float


def compare_clocks(reference: Times, other: Times) -> Clock:
    """How the clock of `other` differs from that of `reference`."""
    ops = reference.shape[1]
    crossing = [op for op in range(2, ops) if (op - 1) % OPS_PER_LAYER != ATTENTION or op == ops - 1]

    def least(sender: Times, receiver: Times) -> float:
        """The smallest distance, over all exchanges, from the sender's last result to the receiver's first input."""
        last_done = np.fmax.reduce(sender[:, :, DONE], axis=0)
        first_staged = np.fmin.reduce(receiver[:, :, STAGED], axis=0)
        return float(min(first_staged[op] - last_done[op - 1] for op in crossing))

    there, back = least(reference, other), least(other, reference)
    return Clock((there - back) / 2, (there + back) / 2)


def merged(ranks: Sequence[Times]) -> Times:
    """The times of all ranks' CTAs, one rank after the other, by one clock that begins with the first of them."""
    parts = []
    for times in ranks:
        part = times.copy()
        part[..., :WAITED] -= compare_clocks(ranks[0], times).ahead if times is not ranks[0] else 0.0
        parts.append(part)
    together = np.concatenate(parts)
    together[..., :WAITED] -= min(0.0, float(np.nanmin(together[..., :WAITED])))
    return together
