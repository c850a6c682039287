"""CUDA graphs: captured launches and their replay; and timing by events around replays, without the host."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from numba_atomflow.device.driver import DriverError, call
from numba_atomflow.device.resources import Resources
from numba_atomflow.ops.cuda.runtime.launch import Launch

MIN_LAUNCHES = 32  # in a timed graph, to amortise some 5 us for its start


class Graph:
    """A step, captured from the launches that also run eagerly. It is never updated: what changes from token to token
    is in device memory. `resources` owns it.
    """

    def __init__(self, launches: Sequence[Launch], stream: Any, resources: Resources) -> None:
        self.stream, self.resources = stream, resources
        with resources.scope() as capturing:
            graph = capturing.make(_capture, launches, stream, undo=partial(call, "cuGraphDestroy"))
            self._executable = resources.call("cuGraphInstantiate", graph, 0, undo="cuGraphExecDestroy")
        call("cuGraphUpload", self._executable, stream)

    def replay(self) -> None:
        """Launch the step in its stream."""
        call("cuGraphLaunch", self._executable, self.stream)


def _capture(launches: Sequence[Launch], stream: Any) -> Any:
    """The driver's graph of these launches.

    Captured in relaxed mode: an engine that was not closed may be collected at any moment, on this thread, and frees
    resources that have nothing to do with this stream. In the other modes such calls fail, and the capture with them.
    """
    from cuda.bindings import driver

    try:
        call("cuStreamBeginCapture", stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        for launch in launches:
            launch.run()
    except BaseException:
        with suppress(DriverError):  # the launch's own error is the one to report
            call("cuGraphDestroy", call("cuStreamEndCapture", stream))
        raise
    return call("cuStreamEndCapture", stream)


def time_graph(graph: Graph, repeats: int, before: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of `repeats` replays, after one that is discarded.

    Args:
        before: called before each replay, outside of the timed interval; launches in the same stream.
    """
    seconds = []
    with graph.resources.scope(graph.stream) as events:
        start, end = (events.call("cuEventCreate", 0, undo="cuEventDestroy") for _ in range(2))
        for _ in range(repeats + 1):
            if before:
                before()
            call("cuEventRecord", start, graph.stream)
            graph.replay()
            call("cuEventRecord", end, graph.stream)
            call("cuEventSynchronize", end)
            seconds.append(call("cuEventElapsedTime", start, end) / 1e3)
    return seconds[1:]


def time_launches(launches: Sequence[Launch], stream: Any, repeats: int, resources: Resources) -> float:
    """Median seconds of one launch, in a sequence long enough to hide the graph's start.

    Args:
        resources: owns the graph.
    """
    times = -(-MIN_LAUNCHES // len(launches))
    with resources.scope(stream) as timing:
        graph = Graph([*launches] * times, stream, timing)
        total = float(np.median(time_graph(graph, repeats)))
    return total / (times * len(launches))
