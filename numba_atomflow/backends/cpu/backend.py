"""The CPU backend: its lifecycle, and what the engine calls.

Weights are read from the mapped checkpoint. It is the default on a machine without a GPU, and the reference for the
CUDA backend: everything but the weights is float32, the KV cache included.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Observer, Verification
from numba_atomflow.backends.cpu.bind import Action, CpuBinder
from numba_atomflow.backends.cpu.measure import CpuMeasurements
from numba_atomflow.errors import CheckpointError, ClosedError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.library_pages import release_library_pages
from numba_atomflow.host.machine import cpu_name
from numba_atomflow.host.threads import choose_threads, describe_threads, kernel_turn, use_threads
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.bounds import check_indices, check_range
from numba_atomflow.memory.plan import Buffer, MemoryPlan, plan_memory
from numba_atomflow.memory.view import View, view_of
from numba_atomflow.model.buffers import StepSizes, step_buffers
from numba_atomflow.model.formats import CPU_KV
from numba_atomflow.model.rope_tables import rope_tables
from numba_atomflow.model.step import (
    ALL_LOGITS,
    LAST_LOGITS,
    SAMPLE,
    Head,
    Op,
    Qkv,
    Weights,
    build_head,
    build_step,
)
from numba_atomflow.ops import attention, projection
from numba_atomflow.sampling import Sampler, SamplingParams, accepted_tokens, most_likely_token
from numba_atomflow.utils.progress import OpenBar, Progress

PREFILL_CHUNK = 512  # tokens per prefill step: so many that converting the weights is a small part of it
HEAD_ROWS = 2 * projection.GEMV_TOKENS + 1  # rows whose logits are computed at once
BOUND_STEPS = 8  # prompt lengths whose steps stay bound


def cpu_plan(geometry: ModelGeometry, max_seq_len: int, threads: int) -> MemoryPlan:
    """What the CPU backend allocates; the weights stay in the mapped file."""
    chunk = min(PREFILL_CHUNK, max_seq_len)
    scratch = max(projection.chunk_scratch(), attention.chunk_scratch(geometry.head_dim))
    return plan_memory(
        [
            *step_buffers(geometry, StepSizes(max_seq_len, chunk, HEAD_ROWS, cache=CPU_KV)),
            Buffer("workspace", "prefill_scratch", (threads, scratch), "float32"),
            Buffer("workspace", "scores", (threads, projection.GEMV_TOKENS, max_seq_len), "float32"),
        ]
    )


class CpuBackend:
    """Runs a checkpoint's ops on the CPU.

    Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name, kept mapped while the backend lives.
        max_seq_len: positions of the KV cache.
        threads: that kernels run on; by default one per core, or what a CPU quota allows.
        check_weights: called after every step; raises if the arrays are not what they were.

    Raises:
        OptionError: there are not that many cores.
    """

    name = "cpu"
    decode_path = prefill_path = None  # there is only one
    device_edits = None  # functions of numba.cuda cannot run here
    launch_verification = None
    verification = Verification(projection.GEMV_TOKENS)

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        threads: int | None = None,
        *,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        self.threads = choose_threads(threads)
        self._check_weights = check_weights
        self.device = f"{cpu_name()}, {describe_threads(self.threads, threads)}"
        self.geometry = geometry
        self.max_seq_len = max_seq_len
        self.plan = cpu_plan(geometry, max_seq_len, self.threads)
        self.prefill_chunk = min(PREFILL_CHUNK, max_seq_len)
        self._weight_arrays = dict(weights)  # views own nothing, and each lookup may create a new array
        views = {
            name: view_of(name, array.view(np.int8) if array.dtype == np.uint8 else array)
            for name, array in self._weight_arrays.items()
        }
        self._weights = Weights.as_stored(views)
        self._arena = HostArena(self.plan)
        self._buffers = {buffer.name: self._arena[buffer.name] for buffer in self.plan.buffers}
        self._position = self._array("position")
        self._tokens = self._array("tokens")
        self._logits = self._array("logits")
        for name, table in rope_tables(geometry, max_seq_len):
            self._array(name)[:] = table
        self._binder = CpuBinder(geometry, self._buffers, Sampler(SamplingParams(), geometry.vocabulary, ()))
        self._bound: dict[tuple[int, Head], _BoundStep] = {}
        self._closed = False
        self._ran_whole_chunk = False
        self.compile_seconds = 0.0

    def _array(self, name: str) -> NDArray[Any]:
        return self._buffers[name].host_array()

    @property
    def observed_chunk(self) -> int:
        """As many as a prefill step takes."""
        return self.prefill_chunk

    @property
    def prompt_lengths(self) -> list[int]:
        """There are kernels for one token, for few and for many."""
        lengths = (1, 2, projection.GEMV_TOKENS + 1)
        return [length for length in lengths if length <= self.max_seq_len]

    def show_compiling(self, open_bar: OpenBar) -> None:
        """All kernels are compiled when the model is loaded."""

    # --- what the engine calls ---------------------------------------------------------------------------------------

    @cached_property
    def measure(self) -> CpuMeasurements:
        """Times ops and steps."""
        return CpuMeasurements(self)

    def close(self) -> None:
        """Release the memory; `measure` refers to the backend, and would keep it until the garbage collector runs.

        Closing twice is fine; every later use raises `ClosedError`.
        """
        self._closed = True
        self._bound.clear()
        self.__dict__.pop("measure", None)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("The backend was closed; load the model again.")

    def prepare(self, progress: Progress | None = None) -> None:
        """Run one op of every kind for one token: all that numba must compile for a reply.

        The kernels for chunks are compiled, or loaded, when a prompt is the first to need them.
        """
        started = time.perf_counter()
        self.seek(0)
        self._tokens[:] = 0
        use_threads(self.threads)
        kinds: dict[type[Op], Op] = {}
        for op in self.step(1, LAST_LOGITS)[:-1]:  # `Advance` compiles nothing, and moves the position
            kinds.setdefault(type(op), op)
        for done, (kind, op) in enumerate(kinds.items()):
            if progress:
                progress(f"compiling {kind.__name__}", done, len(kinds))
            with kernel_turn():
                self._binder.bind(op)()
        release_library_pages()
        if progress:
            progress("compiled", len(kinds), len(kinds))
        self.compile_seconds = time.perf_counter() - started

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step over `tokens` tokens."""
        self._require_open()
        return build_step(self.geometry, self._weights, self._buffers, tokens, head)

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written."""
        self._require_open()
        check_range("position", position, 0, self.max_seq_len)
        self._position[0] = position

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""
        self._require_open()
        self._check_weights()  # before a long prompt is computed for nothing
        self._binder.sampler = sampler

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it."""
        self._tokens[: len(tokens)] = tokens
        actions, done = self.bound_step(len(tokens), head), 0
        self._check_step(len(tokens))
        if len(tokens) == self.prefill_chunk and not self._ran_whole_chunk:  # kernels of chunks are loaded for it
            self._ran_whole_chunk = True
            done = _end_of_first_layer(self.step(len(tokens), head))
            self._run(actions[:done])
            release_library_pages()
        self._run(actions[done:])

    def decode(self) -> None:
        """Run the token that was sampled last, sample the next one, and advance."""
        actions = self.bound_step(1, SAMPLE)
        self._check_step(1)
        self._run(actions)

    def sampled_tokens(self) -> tuple[int, ...]:
        """The token that the last step has sampled."""
        self._require_open()
        return (int(self._tokens[0]),)

    def sampled_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """How likely it was."""
        return self._binder.logprobs

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy).

        A row's logits have the same bits whatever other rows are requested, if they are more than GEMV_TOKENS.
        Fewer have the bits of decode steps, and may differ from that in the last bits.
        """
        out = np.empty((stop - start, self.geometry.vocabulary), np.float32)
        for first, last in _head_blocks(start, stop):
            head = build_head(self.geometry, self._weights, self._buffers, first, last)
            action = self._binder.bind(head)
            self._run([partial(_run_observed, _BoundStep([head], [action]), observer) if observer else action])
            out[first - start : last - start] = self._logits[: last - first]
        return out

    @contextmanager
    def memory(self) -> Iterator["HostMemory"]:
        """Access to views."""
        self._require_open()
        yield HostMemory()

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of 1 to GEMV_TOKENS tokens, with the bits of single decode steps.

        The position stays as it is. The array is valid until the next step; with several rows it is a copy.
        """
        count = len(tokens)
        check_range("tokens of a step that verifies", 0, count, self.verification.width)
        position = int(self._position[0])
        self.prefill(tokens, ALL_LOGITS)
        self.seek(position)
        return self._logits[:1] if count == 1 else self._logits[:count].copy()

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """Those of the tokens after the first that are the most likely ones, and the most likely token after them."""
        logits = self.verify(tokens)
        return accepted_tokens(tokens, lambda row: most_likely_token(logits[row]))

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` with an observer: the same bound list, one op at a time."""
        self._tokens[: len(tokens)] = tokens
        bound = self._bound_step(len(tokens), head)
        check = partial(self._check_step, len(tokens))
        self._run([partial(_run_observed, bound, observer, check)])

    # --- running -----------------------------------------------------------------------------------------------------

    def _run(self, actions: Sequence[Action]) -> None:
        self._require_open()
        use_threads(self.threads)  # another engine may use another number
        try:
            with kernel_turn():
                for action in actions:
                    action()
        except CheckpointError:  # weights that have changed look like damaged ones
            self._check_weights()
            raise
        self._check_weights()

    def run_in_place(self, actions: Sequence[Action]) -> None:
        """A decode step that leaves the position where it was."""
        position = int(self._position[0])
        self._check_step(1)
        self._run(actions)
        self.seek(position)

    def _check_step(self, tokens: int) -> None:
        """Check the position and the tokens, from which the step's kernels compute addresses.

        Raises:
            IndexError: they lead outside of the KV cache or the embedding.
        """
        check_range("positions", int(self._position[0]), tokens, self.max_seq_len)
        check_indices("tokens", self._tokens[:tokens], self.geometry.vocabulary)

    def bound_step(self, tokens: int, head: Head) -> list[Action]:
        """The actions of a step, from a cache of those used last."""
        return self._bound_step(tokens, head).actions

    def _bound_step(self, tokens: int, head: Head) -> "_BoundStep":
        bound = self._bound.pop((tokens, head), None)
        if bound is None:
            ops = self.step(tokens, head)
            bound = _BoundStep(ops, [self._binder.bind(op) for op in ops])
            if len(self._bound) >= BOUND_STEPS:
                del self._bound[next(iter(self._bound))]  # the one not used for longest
        self._bound[tokens, head] = bound
        return bound


class _BoundStep(NamedTuple):
    """A step's ops, and the action of each."""

    ops: list[Op]
    actions: list[Action]


def _end_of_first_layer(ops: Sequence[Op]) -> int:
    """How many ops there are before the second layer's first: among them one of every kind that a layer has."""
    starts = [i for i, op in enumerate(ops) if isinstance(op, Qkv)]
    return starts[1] if len(starts) > 1 else len(ops)


def _run_observed(bound: _BoundStep, observer: Observer, check: Action = lambda: None) -> None:
    """Run every action between its op's two calls of the observer, which may change what `check` reads."""
    memory = HostMemory()
    for op, action in zip(bound.ops, bound.actions, strict=True):
        observer.before(op, memory)
        check()
        action()
        observer.after(op, memory)


def _head_blocks(start: int, stop: int) -> list[tuple[int, int]]:
    """Rows start .. stop - 1 in blocks of at most HEAD_ROWS, none of them so short that only it would take GEMVs."""
    blocks = []
    while start < stop:
        rows = min(HEAD_ROWS, stop - start)
        if 0 < stop - start - rows <= projection.GEMV_TOKENS:
            rows -= projection.GEMV_TOKENS
        blocks.append((start, start + rows))
        start += rows
    return blocks


class HostMemory:
    """Views in host memory, as observers see them."""

    def read(self, view: View) -> NDArray[Any]:
        """The view's contents (a copy)."""
        return view.host_array().copy()

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values` into the view."""
        view.host_array()[:] = values
