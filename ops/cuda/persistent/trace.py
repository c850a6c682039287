"""When each block does what: what a trace of the persistent kernel holds.

Times are read from each multiprocessor's own cycle counter, which is quick; each block also writes down what the common
clock and its own say when it begins and when it ends, so that the host can bring them together (`to_nanoseconds`).
"""

from typing import Any

import numpy as np
from numba import cuda, int64
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape

EVENTS = 6
# Of an op: the block turns to it; what it reads is there; its results are published; the first and the last of its
# weights are asked for; and, a duration, how long the block's first warp waited for weights.
BEGUN, STAGED, DONE, COPY_BEGUN, COPY_DONE, WAITED = range(EVENTS)
# In the place of op 0: the common clock and the block's own, at its beginning and at its end.
_CLOCKS = 4


def make_note(shape: PersistentShape) -> Any:
    """Device function (times, op, event): write the time down; nothing without `shape.trace`.

    times: int64 [blocks, ops, EVENTS], one-dimensional.
    """
    ops, trace = shape.ops, shape.trace

    @ptx.device_function
    def note(times, op, event):
        if trace:
            times[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + event] = int64(ptx.cycles())

    return note


def make_note_clocks(shape: PersistentShape) -> Any:
    """Device function (times, end): write both clocks down, at the beginning (0) or the end (1) of a block."""
    ops, trace = shape.ops, shape.trace

    @ptx.device_function
    def note_clocks(times, end):
        if trace:
            at = int64(cuda.blockIdx.x) * ops * EVENTS + 2 * end
            times[at] = int64(ptx.nanoseconds())
            times[at + 1] = int64(ptx.cycles())

    return note_clocks


def to_nanoseconds(times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Times [blocks, ops, EVENTS] of a traced launch in nanoseconds since its first block began; NaN where nothing was
    noted.
    """
    begun, begun_cycles, ended, ended_cycles = (times[:, 0, i] for i in range(_CLOCKS))
    length = (ended - begun) / (ended_cycles - begun_cycles)
    since = begun - begun.min()  # the common clock counts from 1970: too far for a float64 to tell nanoseconds apart
    found = (times - begun_cycles[:, None, None]) * length[:, None, None] + since[:, None, None]
    found[..., WAITED] = times[..., WAITED] * length[:, None]
    found[times == 0] = np.nan
    found[:, 0] = np.nan
    return np.asarray(found)
