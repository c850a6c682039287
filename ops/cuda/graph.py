"""Launches captured into a graph and replayed; and times, by events around replays: the host takes no part in them."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from numba_atomflow.driver import DriverError, call
from numba_atomflow.ops.cuda.launch import Launch

LEAST_LAUNCHES = 32  # in a timed graph: starting it costs some 5 us, which this many share


class Graph:
    """A step, captured from the launches that also run eagerly. It is never patched: all that changes from token to
    token is in device memory.
    """

    def __init__(self, launches: Sequence[Launch], stream: Any) -> None:
        from cuda.bindings import driver

        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", stream, mode)
        try:
            for launch in launches:
                launch.run()
        except BaseException:
            with suppress(DriverError):  # the launch's own error is the one to tell
                call("cuGraphDestroy", call("cuStreamEndCapture", stream))
            raise
        graph = call("cuStreamEndCapture", stream)
        self._stream = stream
        try:
            self._executable = call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)
        try:
            call("cuGraphUpload", self._executable, stream)
        except BaseException:
            self.destroy()
            raise

    def replay(self) -> None:
        """Put the step into the stream once more."""
        call("cuGraphLaunch", self._executable, self._stream)

    def destroy(self) -> None:
        """Give its memory back."""
        call("cuGraphExecDestroy", self._executable)


def time_graph(graph: Graph, stream: Any, repeats: int, before: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of `repeats` replays, after one that is thrown away.

    Args:
        before: put into the stream ahead of each replay, outside of what is timed.
    """
    seconds = []
    start, end = call("cuEventCreate", 0), call("cuEventCreate", 0)
    try:
        for _ in range(repeats + 1):
            if before:
                before()
            call("cuEventRecord", start, stream)
            graph.replay()
            call("cuEventRecord", end, stream)
            call("cuEventSynchronize", end)
            seconds.append(call("cuEventElapsedTime", start, end) / 1e3)
    finally:
        call("cuEventDestroy", start)
        call("cuEventDestroy", end)
    return seconds[1:]


def time_launches(launches: Sequence[Launch], stream: Any, repeats: int) -> float:
    """Median seconds of one launch, when these follow each other, as often as it takes to hide the graph's start."""
    graph = Graph([*launches] * -(-LEAST_LAUNCHES // len(launches)), stream)
    try:
        total = float(np.median(time_graph(graph, stream, repeats)))
    finally:
        graph.destroy()
    return total / (-(-LEAST_LAUNCHES // len(launches)) * len(launches))
