"""Timestamps of the persistent kernel: when each CTA does what.

They are read from each SM's own cycle counter, which is cheap. At its start and at its end a CTA records the global
timer and its cycle counter together, so that the host can convert all of them to one clock (`to_nanoseconds`).
"""

from typing import Any

import numpy as np
from numba import cuda, int64
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape

EVENTS = 6
# Of an op: the CTA begins it; its input is in shared memory; its results are published; the first and the last copy
# of its weights are issued; and, a duration, how long the CTA's first warp waited for weights.
BEGUN, STAGED, DONE, COPY_BEGUN, COPY_DONE, WAITED = range(EVENTS)
# In the row of op 0: the global timer and the CTA's cycle counter, at its start and at its end.
_CLOCKS = 4


def make_timestamp(shape: PersistentShape) -> Any:
    """Device function (timestamps, op, event): record the time; nothing without `shape.trace`.

    timestamps: int64 [CTAs, ops, EVENTS], one-dimensional.
    """
    ops, trace = shape.ops, shape.trace

    @ptx.device_function
    def timestamp(timestamps, op, event):
        if trace:
            timestamps[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + event] = int64(ptx.cycles())

    return timestamp


def make_record_clocks(shape: PersistentShape) -> Any:
    """Device function (timestamps, end): record both clocks, at the start (0) or the end (1) of a CTA."""
    ops, trace = shape.ops, shape.trace

    @ptx.device_function
    def record_clocks(timestamps, end):
        if trace:
            index = int64(cuda.blockIdx.x) * ops * EVENTS + 2 * end
            timestamps[index] = int64(ptx.nanoseconds())
            timestamps[index + 1] = int64(ptx.cycles())

    return record_clocks


def to_nanoseconds(timestamps: NDArray[np.int64]) -> NDArray[np.float64]:
    """Timestamps [CTAs, ops, EVENTS] of a traced launch, in nanoseconds since its first CTA started; NaN where nothing
    was recorded.
    """
    start, start_cycles, end, end_cycles = (timestamps[:, 0, i] for i in range(_CLOCKS))
    cycle_ns = (end - start) / (end_cycles - start_cycles)
    start_offset = start - start.min()  # the timer counts from 1970: a float64 could not tell nanoseconds apart
    nanoseconds = (timestamps - start_cycles[:, None, None]) * cycle_ns[:, None, None] + start_offset[:, None, None]
    nanoseconds[..., WAITED] = timestamps[..., WAITED] * cycle_ns[:, None]
    nanoseconds[timestamps == 0] = np.nan
    nanoseconds[:, 0] = np.nan
    return np.asarray(nanoseconds)
