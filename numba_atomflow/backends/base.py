"""What the engine expects of a backend: to run a model, and to be measured."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View
from numba_atomflow.model.activations import Activation
from numba_atomflow.model.step import Head, Op
from numba_atomflow.sampling import Sampler
from numba_atomflow.utils.progress import OpenBar, Progress

Decode = Literal["auto", "graph", "persistent"]  # the requested way of running decode steps on a GPU
Prefill = Literal["auto", "gemv", "gemm", "fp8"]  # the requested way of running prompts on a GPU


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


@dataclass(frozen=True)
class PrefillPath:
    """How prompts run on a GPU.

    Attributes:
        name: "gemv", up to 8 tokens a step in the kernels of decode steps; "gemm", chunks of many tokens in tensor core
            kernels; "fp8", the same with activations rounded to FP8.
        reason: why it is not another one, as a clause; "" if it was requested.
    """

    name: Literal["gemv", "gemm", "fp8"]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}, because {self.reason}" if self.reason else self.name


@dataclass(frozen=True)
class Verification:
    """Whether a backend can check proposed tokens (speculative decoding) without changing a bit of any result.

    Attributes:
        width: most tokens of a step of `Backend.verify`; 1 where the backend cannot.
        reason: why it cannot, as a clause; "" if it can.
        automatic: it is used without being asked for (`SamplingParams(speculate="auto")`).
    """

    width: int
    reason: str = ""
    automatic: bool = True


class LaunchVerification(Protocol):
    """Launches a step that verifies."""

    def __call__(self, tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        """Launch `Backend.verify` of these tokens, and return a function that waits for what was chosen: those of the
        tokens after the first that are accepted, and the token after them. It is called before any other step.

        Args:
            sampled: by the sampler of `Backend.start`, which knows what came before (`Sampler.note`) and is not
                changed: what `decode` would sample. Otherwise the most likely tokens.

        Raises:
            IndexError: as `verify`.
            CheckpointError: logits contain NaN or Inf; when the result is waited for.
        """


class Memory(Protocol):
    """A backend's memory, as an observer sees it: by copies, because it may be on a device."""

    def read(self, view: View) -> NDArray[Any]:
        """The view's contents (a copy)."""

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values`, of the view's shape, into the view; they are converted to its dtype."""


class Observer(Protocol):
    """Called for every op of a step, just before and just after it runs; may change what it reads or has written."""

    def before(self, op: Op, memory: Memory) -> None: ...

    def after(self, op: Op, memory: Memory) -> None: ...


class EditBlock(Protocol):
    """Edits of one block by device functions, compiled.

    Attributes:
        edits: activations and edits, which can be called like functions of NumPy arrays.
    """

    @property
    def edits(self) -> Sequence[tuple[Activation, Any]]: ...

    def close(self) -> None:
        """Give back what the functions have needed; no step runs under them any more."""


class DeviceEdits(Protocol):
    """Edits of activations by functions that run on the backend's device, in the order of their blocks."""

    def compile(self, edits: Sequence[tuple[Activation, Any]]) -> EditBlock:
        """The edits of a block, by functions of numba.cuda, ready to run.

        Raises:
            OptionError: one cannot be compiled.
        """

    def capture(self, edits: Sequence[tuple[Activation, Any]]) -> None:
        """Make `Backend.decode` run under these compiled edits; without any, as it was."""

    def check(self) -> None:
        """Raise if a function has returned what no step can go on with.

        Raises:
            OptionError: it has.
        """


class Measurements(Protocol):
    """Times of a backend's decode step. Every run is at the current position, which is the same afterwards; the
    sampled token is another.
    """

    def ceilings(self) -> dict[str, float]:
        """Achievable bandwidth of this device's memory, measured now: GB/s, by the way of reading."""

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops in order, each with its typical seconds over `repeats` runs.

        Ops run one at a time, from the list that `decode` runs; those that are parts of one kernel have the seconds
        that each adds to `trace_step`.
        """

    def time_step(self, repeats: int) -> float:
        """Typical seconds of the decode step as `decode` runs it."""

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace | None:
        """When each CTA of the decode step's one kernel did what, in that of `repeats` runs which is the median by
        length; None where a step is not one kernel.

        The first call compiles the traced kernel, or loads it from the cache.
        """


class Backend(Protocol):
    """A device that holds weights, KV cache and activations of one model, and runs its ops.

    Attributes:
        prefill_chunk: most tokens of one prefill step.
        compile_seconds: that `prepare` spent on compiling kernels or loading them from the cache; prompts may add some.
    """

    name: str
    device: str
    plan: MemoryPlan
    prefill_chunk: int
    compile_seconds: float

    @property
    def observed_chunk(self) -> int:
        """Most tokens of one step of `observe`, and most rows of `logits` with an observer."""

    @property
    def decode_path(self) -> DecodePath | None:
        """How decode steps run, where there is more than one way; None on the CPU."""

    @property
    def prefill_path(self) -> PrefillPath | None:
        """How prompts run, where there is more than one way; None on the CPU."""

    @property
    def prompt_lengths(self) -> Sequence[int]:
        """Lengths of prompts, ascending, that between them run every kernel and graph that a prompt may need."""

    def show_compiling(self, open_bar: OpenBar) -> None:
        """Open a bar whenever kernels are compiled from now on: those of prompts are when a prompt first needs them."""

    @property
    def verification(self) -> Verification:
        """Whether `verify` can run, and how many tokens at once."""

    @property
    def device_edits(self) -> DeviceEdits | None:
        """Edits by device functions, once it is prepared; None where none can run."""

    @property
    def measure(self) -> Measurements:
        """What times this backend, once it is prepared."""

    def prepare(self, progress: Progress | None) -> None:
        """Make everything ready to run, and compile what every reply needs, or load it from the cache.

        Kernels that only some prompts need follow with the first of them.
        """

    def close(self) -> None:
        """Release the memory at once, not when the garbage collector runs."""

    def step(self, tokens: int, head: Head) -> Sequence[Op]:
        """The ops of a step over `tokens` tokens."""

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written."""

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it. May return before it is done."""

    def decode(self) -> None:
        """Run a decode step: take the tokens that were sampled last through the model, sample, and advance.

        May return before it is done.
        """

    def sampled_tokens(self) -> Sequence[int]:
        """The tokens that the last step has sampled, one or more, in order; waits for them.

        All but the last of them are in the KV cache already; `decode` continues with the last.
        """

    def sampled_logprobs(self) -> Sequence[TokenLogprobs]:
        """How likely the tokens that `sampled_tokens` has returned were; only if the sampler requests `logprobs`."""

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy)."""

    def memory(self) -> AbstractContextManager[Memory]:
        """Access to the views of `step`'s ops while no step is called; a read waits for the steps before it."""

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of 1 to `verification.width` tokens at the current position.

        Row i, and what token i leaves in the KV cache, have the bits that single decode steps give. The position stays
        as it is: the caller seeks to what it accepts. Row 0 is valid until the next call; further rows until the next
        `verify`, because `Engine.unembed` may be called before they are used.

        Raises:
            IndexError: there are more tokens, or they do not fit into the KV cache.
        """

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """`verify` for greedy decoding: those of the tokens after the first that are the most likely ones, up to the
        first that is not, and the most likely token after them.

        Raises:
            IndexError: as `verify`.
            CheckpointError: logits contain NaN or Inf.
        """

    @property
    def launch_verification(self) -> LaunchVerification | None:
        """What launches `verify` with tokens that the device chooses; None where the host computes, or samples from the
        logits of `verify`.
        """

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` of up to `observed_chunk` tokens with an observer; for one token and `SAMPLE`, `decode` with an
        observer.

        It executes the list that `prefill` and `decode` run, and finishes each op before the observer sees it.
        """
