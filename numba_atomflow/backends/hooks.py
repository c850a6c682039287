"""Hooks for research: observers that record named activations or replace them, and a backend that runs under edits.

A backend under edits makes every step with `Backend.observe`, one op at a time, where others replay a bound or captured
list; results without a change have the same bits. Arrays are on the host. Where all edits are functions of the device,
decode steps are captured with them.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import (
    Backend,
    DecodePath,
    DeviceEdits,
    Measurements,
    Memory,
    Observer,
    PrefillPath,
    Verification,
)
from numba_atomflow.errors import CheckpointError, OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.memory.bounds import check_range
from numba_atomflow.memory.view import View
from numba_atomflow.model.activations import Activation, select
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Embed, Head, LmHead, Op
from numba_atomflow.sampling import Sampler, most_likely_token
from numba_atomflow.utils.progress import OpenBar, Progress

Rows = NDArray[np.float32]  # [tokens, width]
Edit = Callable[[Rows, int], Rows | None]

LEAST_LOGIT = np.float32(-1e30)  # written for -inf, which a GPU's sampler takes for a fault


class _Place(NamedTuple):
    """Where a step has an activation: the view of its rows, and the position of the first."""

    view: View
    position: int


class _Step:
    """Where the activations of the current step are.

    Attributes:
        position: of the step's first token.
    """

    def __init__(self, backend: Backend) -> None:
        self.position = 0
        embed = backend.step(1, NO_LOGITS)[0]
        assert isinstance(embed, Embed)  # noqa: S101  a step begins with it
        self._residual = embed.residual

    def row(self, op: LmHead) -> int:
        """The first of the step's rows that the head reads."""
        return (op.residual.address - self._residual.address) // self._residual.strides[0]

    def place(self, activation: Activation, op: Op) -> _Place:
        view: View = getattr(op, activation.field)
        if isinstance(op, LmHead):  # of some of the step's rows
            return _Place(view, self.position + self.row(op))
        if activation.is_cached:
            tokens = op.writes[0].shape[0]
            return _Place(view.rows(self.position, self.position + tokens), self.position)
        return _Place(view, self.position)


class Recorder:
    """An observer that copies activations into arrays.

    Attributes:
        arrays: float32 [tokens, width] by name; row 0 is position 0.
    """

    def __init__(self, backend: Backend, chosen: Iterable[Activation], tokens: int) -> None:
        self.arrays = {each.name: np.empty((tokens, each.width), np.float32) for each in chosen}
        self._by_op = _by_op((each, each) for each in chosen)
        self._step = _Step(backend)
        self._before: NDArray[Any] | None = None  # the stream before an op of which the difference is wanted

    def begin(self, position: int) -> None:
        """Set the position of the next step's first token."""
        self._step.position = position

    def before(self, op: Op, memory: Memory) -> None:
        """Keep the stream of which a difference is wanted."""
        if any(each.is_difference for each in self._by_op.get(op.name, ())):
            self._before = memory.read(op.writes[0])

    def after(self, op: Op, memory: Memory) -> None:
        """Record."""
        for each in self._by_op.get(op.name, ()):
            place = self._step.place(each, op)
            rows = memory.read(place.view).astype(np.float32)
            if each.is_difference and self._before is not None:
                rows -= self._before
            self.arrays[each.name][place.position : place.position + len(rows)] = rows


class _Edits:
    """An observer that passes activations through functions."""

    def __init__(self, backend: Backend, edits: Sequence[tuple[Activation, Edit]]) -> None:
        self._by_op = _by_op((activation, (activation, function)) for activation, function in edits)
        self._step = _Step(backend)

    def begin(self, position: int) -> None:
        self._step.position = position

    def before(self, op: Op, memory: Memory) -> None:
        """No effect."""

    def after(self, op: Op, memory: Memory) -> None:
        for activation, function in self._by_op.get(op.name, ()):
            place = self._step.place(activation, op)
            rows = memory.read(place.view).astype(np.float32)
            rows.flags.writeable = False  # a change in place would be lost
            result = function(rows, place.position)
            if result is not None:
                memory.write(place.view, _checked(result, activation, place.view))


class _Stream:
    """An observer that puts rows into the residual stream before the LM head reads it."""

    def __init__(self, backend: Backend, rows: Rows) -> None:
        self._rows, self._step = rows, _Step(backend)

    def before(self, op: Op, memory: Memory) -> None:
        if isinstance(op, LmHead):
            first = self._step.row(op)
            memory.write(op.residual, self._rows[first : first + op.residual.shape[0]])

    def after(self, op: Op, memory: Memory) -> None:
        """No effect."""


def unembed(backend: Backend, rows: Rows) -> Rows:
    """Logits [n, V] of any rows [n, hidden] of a residual stream: final norm and LM head."""
    chunk = backend.observed_chunk
    parts = [rows[start : start + chunk] for start in range(0, len(rows), chunk)]
    return np.concatenate([backend.logits(0, len(part), _Stream(backend, part)) for part in parts])


def _by_op(entries: Iterable[tuple[Activation, Any]]) -> dict[str, list[Any]]:
    ops: dict[str, list[Any]] = {}
    for activation, entry in entries:
        ops.setdefault(activation.op, []).append(entry)
    return ops


def _checked(result: object, activation: Activation, view: View) -> NDArray[Any]:
    """What an edit has returned, in the view's dtype.

    Raises:
        OptionError: it is no array of numbers of the view's shape, or holds NaN, infinity, or what the dtype cannot, or
            forbids every token.
    """
    what = f"The edit of {activation.name} returned"
    array = np.asarray(result)
    if array.shape != view.shape or array.dtype.kind not in "fiub":
        raise OptionError(
            f"{what} {array.dtype} {list(array.shape)}; it must return numbers of shape {list(view.shape)}, or None."
        )
    with np.errstate(over="ignore"):
        values = array.astype(view.dtype)
    if activation.name == "logits":
        values[np.isneginf(values)] = LEAST_LOGIT
    if not np.isfinite(values).all():
        raise OptionError(f"{what} NaN, infinity, or a number too large for {view.dtype}; it must return finite ones.")
    if activation.name == "logits" and (values <= LEAST_LOGIT).all(axis=-1).any():
        raise OptionError(f"{what} -inf for every token; at least one must remain.")
    return values


class _InOrder:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def before(self, op: Op, memory: Memory) -> None:
        for observer in self._observers:
            observer.before(op, memory)

    def after(self, op: Op, memory: Memory) -> None:
        for observer in self._observers:
            observer.after(op, memory)


class EditedBackend:
    """A backend whose steps run under edits, and otherwise the same.

    Args:
        backend: that runs the steps; it may be such a one itself, and its edits then come first.
        edits: functions of the rows [tokens, width] of an activation and the position of the first; they return what is
            written in their place, or None.
        captured: has these edits in the decode steps of `backend`; None: `decode` runs an op at a time, too.
    """

    launch_verification = None

    def __init__(
        self, backend: Backend, edits: Sequence[tuple[Activation, Edit]], captured: DeviceEdits | None = None
    ) -> None:
        self._backend, self._edits, self._captured = backend, _Edits(backend, edits), captured
        self._position = 0  # at which the next token is written
        self.name, self.device, self.plan = backend.name, backend.device, backend.plan
        self.prefill_chunk = self.observed_chunk = backend.observed_chunk
        self.compile_seconds = backend.compile_seconds

    # --- under edits -------------------------------------------------------------------------------------------------

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written."""
        self._backend.seek(position)
        self._position = position

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it: as many as under an observer."""
        self._observe(tokens, head, self._edits)

    def decode(self) -> None:
        """Run the token that was sampled last, sample the next one, and advance."""
        if self._captured is None:
            self._observe(self._backend.sampled_tokens()[-1:], SAMPLE, self._edits)
        else:
            self._backend.decode()
            self._position += 1

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` with an observer, which sees edited values."""
        self._observe(tokens, head, _InOrder(self._edits, observer))

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy)."""
        observers = self._edits if observer is None else _InOrder(self._edits, observer)
        logits: NDArray[np.float32] = self._backend.logits(start, stop, observers)
        return logits

    @property
    def verification(self) -> Verification:
        """Not possible: proposed tokens that are not accepted would pass through the functions, too."""
        return Verification(1, "activations are being edited")

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [1, V] after one token at the current position, which stays."""
        check_range("tokens of a step that verifies", 0, len(tokens), self.verification.width)
        position = self._position
        self._observe(tokens, NO_LOGITS, self._edits)
        logits = self.logits(0, 1)
        self.seek(position)
        return logits

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """The most likely token after one token at the current position, which stays."""
        return [most_likely_token(self.verify(tokens)[0])]

    def _observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        self._edits.begin(self._position)
        self._backend.observe(tokens, head, observer)
        self._position += len(tokens)

    # --- as without --------------------------------------------------------------------------------------------------

    @property
    def prompt_lengths(self) -> Sequence[int]:
        """Lengths of prompts that run every kernel that a prompt may need."""
        return self._backend.prompt_lengths

    def show_compiling(self, open_bar: OpenBar) -> None:
        """Open a bar whenever kernels are compiled."""
        self._backend.show_compiling(open_bar)

    @property
    def decode_path(self) -> DecodePath | None:
        """How decode steps run without edits."""
        return self._backend.decode_path

    @property
    def prefill_path(self) -> PrefillPath | None:
        """How prompts run."""
        return self._backend.prefill_path

    @property
    def device_edits(self) -> DeviceEdits | None:
        """Edits by device functions."""
        return self._backend.device_edits

    @property
    def measure(self) -> Measurements:
        """What times the backend, without edits."""
        return self._backend.measure

    def prepare(self, progress: Progress | None) -> None:
        """Make everything ready to run."""
        self._backend.prepare(progress)

    def close(self) -> None:
        """Release the memory."""
        self._backend.close()

    def step(self, tokens: int, head: Head) -> Sequence[Op]:
        """The ops of a step over `tokens` tokens."""
        return self._backend.step(tokens, head)

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""
        self._backend.start(sampler)

    def memory(self) -> AbstractContextManager[Memory]:
        """Access to the views of `step`'s ops."""
        return self._backend.memory()

    def sampled_tokens(self) -> Sequence[int]:
        """The tokens that the last step has sampled."""
        try:
            return self._backend.sampled_tokens()
        except CheckpointError:  # NaN: of an edit, before it is of the model
            if self._captured is not None:
                self._captured.check()
            raise

    def sampled_logprobs(self) -> Sequence[TokenLogprobs]:
        """How likely they were."""
        return self._backend.sampled_logprobs()


class RunningEdits(NamedTuple):
    """The edits of a block, ready to run.

    Attributes:
        in_steps: all are device functions, which captured decode steps may have.
        close: gives back what they have needed.
    """

    edits: Sequence[tuple[Activation, Edit]]
    in_steps: bool
    close: Callable[[], None]


def prepare_edits(backend: Backend, edits: Sequence[tuple[Activation, Any]]) -> RunningEdits:
    """Compile those that are device functions (``@numba.cuda.jit(device=True)``).

    Raises:
        OptionError: the backend cannot run them, or one cannot be compiled.
    """
    on_device = [(activation, function) for activation, function in edits if _is_device_function(function)]
    if not on_device:
        return RunningEdits(edits, in_steps=False, close=lambda: None)
    if backend.device_edits is None:
        raise OptionError(
            f"The edit of {on_device[0][0].name} is a device function of numba.cuda, but this engine's backend is "
            f"{backend.name}; give a function of NumPy arrays, or load the model on one GPU."
        )
    block = backend.device_edits.compile(on_device)
    compiled = iter(block.edits)
    ready = [next(compiled) if _is_device_function(function) else (at, function) for at, function in edits]
    return RunningEdits(ready, in_steps=len(on_device) == len(edits), close=block.close)


def _is_device_function(function: object) -> bool:
    dispatcher = sys.modules.get("numba.cuda.dispatcher")  # imported where one was made
    return dispatcher is not None and isinstance(function, dispatcher.CUDADispatcher)


def edits_of(functions: Mapping[str, Edit], geometry: ModelGeometry) -> list[tuple[Activation, Edit]]:
    """The edits that a mapping from names, or globs, to functions asks for.

    Raises:
        OptionError: a name stands for no activation, or for one that cannot be edited; or a value is no function.
    """
    given: object = functions
    if not isinstance(given, Mapping) or len(given) == 0:
        raise OptionError("Edits are a mapping from names of activations to functions, with at least one entry.")
    edits = []
    for name, function in functions.items():
        if not callable(function):
            raise OptionError(f"The edit of {quote(name)} is no function; give one of the rows and their position.")
        for activation in select([name], geometry):
            if activation.instead:
                raise OptionError(
                    f"{activation.name} can be captured but not edited, because its op has used it already; "
                    f"edit {activation.instead}."
                )
            edits.append((activation, function))
    return edits
