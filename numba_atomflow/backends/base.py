"""What the engine asks of a backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Head, Op
from numba_atomflow.sampling import Sampler
from numba_atomflow.utils.progress import Progress

Decode = Literal["auto", "graph", "persistent"]  # how a GPU is asked to run decode steps


@dataclass(frozen=True)
class DecodePath:
    """How decode steps run on a GPU.

    Attributes:
        name: "graph", the step's kernels one after the other, or "persistent", one kernel for the whole step.
        reason: why it is not "persistent", as a clause; "" if it is.
    """

    name: Literal["graph", "persistent"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}" if self.reason else self.name


class Memory(Protocol):
    """A backend's memory, as an observer sees it: by copies, because it may be on a device."""

    def read(self, view: View) -> NDArray[Any]:
        """What the view holds now (a copy)."""

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values`, of the view's shape, into the view; they are converted to its dtype."""


class Observer(Protocol):
    """Looks at every op of a step just before and just after it runs, and may change what it reads or wrote."""

    def before(self, op: Op, memory: Memory) -> None: ...

    def after(self, op: Op, memory: Memory) -> None: ...


class Backend(Protocol):
    """A device that holds weights, KV cache and activations of one model, and runs its ops."""

    name: str
    device: str
    plan: MemoryPlan
    prefill_chunk: int  # most tokens of one prefill step
    compile_seconds: float  # that `prepare` spent on compiling kernels or loading them from the cache

    @property
    def decode_path(self) -> DecodePath | None:
        """How decode steps run, where there is more than one way; None on the CPU."""

    def close(self) -> None:
        """Release the memory at once, not when the garbage collector comes by."""

    def prepare(self, progress: Progress | None) -> None:
        """Compile every kernel, or load it from the cache."""

    def step(self, tokens: int, head: Head) -> Sequence[Op]:
        """The ops of a step over `tokens` tokens."""

    def seek(self, position: int) -> None:
        """Set the position at which the next token will be written."""

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Take up to `prefill_chunk` tokens through the model at the current position, and advance it."""

    def decode(self) -> None:
        """Take the token that was sampled last through the model, sample the next one, and advance."""

    def sampled_token(self) -> int:
        """The token that was sampled last."""

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy)."""

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` with an observer; for one token and `SAMPLE`, `decode` with an observer.

        It walks the very list that `prefill` and `decode` run, and finishes each op before the observer sees it.
        """

    # --- what `bench` and `profile` ask ------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """How fast this device's memory can be read, measured now: GB/s, by the name of the way of reading."""

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops in order, each with its typical seconds over `repeats` runs.

        Ops run one at a time, through the list that `decode` runs; those that are parts of one kernel have the seconds
        that each adds to `trace_step`. Every run starts at the current position, which is what it was afterwards; the
        sampled token is another.
        """

    def time_step(self, repeats: int) -> float:
        """Typical seconds of the decode step as `decode` runs it, under the same conditions as `time_ops`."""

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace | None:
        """When each block of the decode step's one kernel did what, in that of `repeats` runs which is the median by
        length, under the same conditions; None where a step is not one kernel.

        The first call compiles the kernel that takes the times, or loads it from the cache.
        """
