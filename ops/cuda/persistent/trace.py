"""When each block does what: what a trace of the persistent kernel holds."""

from typing import Any

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.persistent.shape import PersistentShape

EVENTS = 3  # of an op: the block turns to it; what it reads is there; its results are published
BEGUN, STAGED, DONE = range(EVENTS)


def make_note(shape: PersistentShape) -> Any:
    """Device function (times, op, event, thread): write the time down; nothing without `shape.trace`.

    times: int64 nanoseconds [blocks, ops, EVENTS], one-dimensional.
    """
    ops, trace = shape.ops, shape.trace

    @ptx.device_function
    def note(times, op, event, thread):  # type: ignore[no-untyped-def]
        if trace and thread == 0:
            times[(int64(cuda.blockIdx.x) * ops + op) * EVENTS + event] = int64(ptx.nanoseconds())

    return note
