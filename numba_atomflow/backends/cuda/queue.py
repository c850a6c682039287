"""Asynchronous run-ahead: steps are queued on the GPU before the host needs their tokens.

To the device, a prompt's chunks are copied from pinned memory in stream order, and so are the options of sampling and
the position: the host waits for none of them. To the host, a step's last kernel posts
each sampled token, with its number, to a ring in pinned memory that the host polls: no synchronisation with the stream.
Run-ahead counts sampling steps, not tokens; today a step samples one token, so that the token's number is the step's.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.kernels import TOKEN_RING
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.persistent import watchdog_error
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import DeviceResources, Resources, closed_error
from numba_atomflow.errors import BackendError, CheckpointError, non_finite_logits
from numba_atomflow.memory.bounds import check_range
from numba_atomflow.memory.device import PinnedArray
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import SAMPLE, Head

RUN_AHEAD = 3  # decode steps that are queued before they are requested; at a generation's end they are discarded
POLLS = 2000  # of pinned memory (some 100 us) between checks of the stream
_ID_BITS = 31


class TokenRing:
    """The ring in pinned host memory that the device posts sampled tokens to. `resources` owns it.

    An entry is 8 bytes: the token's number (from 1 on) in the upper half, its id in the lower, with bit 31 set where
    the logits were not finite.
    """

    def __init__(self, resources: Resources) -> None:
        self._pinned = PinnedArray((TOKEN_RING,), "uint64", resources)

    @property
    def view(self) -> View:
        """The ring on the device."""
        return self._pinned.view

    def receive(self, number: int, check: Callable[[], None]) -> int:
        """The token with this number; polls until the device has posted it.

        Args:
            check: called now and then meanwhile; raises if the token cannot come any more.

        Raises:
            CheckpointError: its logits contain NaN or Inf.
        """
        index, tag = (number - 1) % TOKEN_RING, number & 0xFFFFFFFF
        posted = self._pinned.array[index : index + 1]
        polls = 0
        while True:
            entry = int(posted[0])
            if entry >> 32 == tag:
                break
            polls += 1
            if polls % POLLS == 0:
                check()
                time.sleep(0)  # let other threads run
        return posted_token(entry)


def posted_token(entry: int) -> int:
    """The token in the lower half of what the device has posted.

    Raises:
        CheckpointError: its logits contain NaN or Inf.
    """
    if entry >> _ID_BITS & 1:
        raise non_finite_logits()
    return entry & ((1 << _ID_BITS) - 1)


class DeviceSteps(Protocol):
    """What runs the steps of a queue: one GPU, or several that share a model. Its context is current, but for
    `current`.
    """

    @property
    def closed(self) -> bool:
        """Whether its memory has been given back."""

    def current(self) -> AbstractContextManager[None]:
        """What makes its context current."""

    def run(self, tokens: int, head: Head) -> None:
        """Put a step into the stream."""

    def set_position(self, position: int) -> None:
        """Set the position at which the next token is written; nothing runs."""

    def settle(self, position: int) -> None:
        """Wait for all steps, of which the last may have failed, and set the position."""

    def posted_tokens(self) -> int:
        """Tokens posted to the host so far."""

    def check_watchdog(self) -> None:
        """Raise if the watchdog of the persistent kernel tripped. Its token then counts as one with NaN logits."""

    def finished(self) -> bool:
        """Whether all steps have ended; raises if the GPU failed."""


class GraphSteps:
    """The steps of one GPU."""

    def __init__(self, model: DeviceModel, graphs: StepGraphs, owner: DeviceResources) -> None:
        self._model, self._graphs, self._owner = model, graphs, owner
        self.run, self.set_position, self.posted_tokens = graphs.run, model.set_position, model.posted_tokens
        self.current = owner.current

    @property
    def closed(self) -> bool:
        return self._owner.closed

    def settle(self, position: int) -> None:
        self._model.set_position(position)
        self._model.reset_argmax()  # a step may have ended between its arg-max and its end
        if self._graphs.persistent is not None:
            self._graphs.persistent.reset(self._model.memory)

    def check_watchdog(self) -> None:
        if self._graphs.persistent is not None and self._model.memory.read(self._model.buffers["persistent.fault"])[0]:
            raise watchdog_error()

    def finished(self) -> bool:
        return stream_finished(self._model.stream)


def stream_finished(stream: Any) -> bool:
    """Whether all work of a stream is done.

    Raises:
        DriverError: the GPU failed.
    """
    from cuda.bindings import driver

    (status,) = driver.cuStreamQuery(stream)
    if status == driver.CUresult.CUDA_ERROR_NOT_READY:
        return False
    call("cuStreamSynchronize", stream)  # an error is raised here
    return True


class StepQueue:
    """The steps that are queued on the device, and the host's position among them.

    Attributes:
        position: the device's position after all queued steps.
        check_watchdog: `DeviceSteps.check_watchdog`.
    """

    def __init__(self, steps: DeviceSteps, ring: TokenRing, max_seq_len: int) -> None:
        self._steps, self._ring, self._max_seq_len = steps, ring, max_seq_len
        self.check_watchdog = steps.check_watchdog
        self.position = 0
        self._queued = 0  # number of the last sampling step that is queued, from 1 on
        self._requested = 0  # number of the last one whose tokens the host has requested
        self._exact = True  # whether these numbers are right: not after Ctrl-C between a launch and its count
        self._moved = False  # the device's position is still another one: steps that verify do not read it

    # --- queueing; the GPU's context is current ----------------------------------------------------------------------

    def run(self, tokens: int, head: Head) -> None:
        """Queue a step and request its tokens."""
        self._launch(tokens, head)
        self._requested = self._queued

    @contextmanager
    def launching(self, tokens: int, head: Head) -> Iterator[None]:
        """The body launches a step; afterwards the step is counted, and its tokens are requested."""
        self._exact = False
        self._write_position()
        yield
        self.count(tokens, head)
        self._requested = self._queued

    def _launch(self, tokens: int, head: Head) -> None:
        self._exact = False
        self._write_position()
        self._steps.run(tokens, head)
        self.count(tokens, head)

    def _write_position(self) -> None:
        """Move the device to the host's position."""
        if self._moved:
            self._steps.set_position(self.position)
            self._moved = False

    def count(self, tokens: int, head: Head) -> None:
        """Take note of a step that has been launched."""
        self.position += tokens
        if head.sample:
            self._queued += 1
        self._exact = True

    @property
    def requested(self) -> int:
        """Number, from 1 on, of the token that `receive` returns."""
        return self._requested

    # --- the host's side ---------------------------------------------------------------------------------------------

    def decode(self) -> None:
        """Request the next decode step, and queue those after it as far as `RUN_AHEAD` allows.

        Raises:
            RuntimeError: there is no position left; the engine stops before.
        """
        self._requested += 1
        with self._steps.current():
            while self._queued < self._requested + RUN_AHEAD and self.position < self._max_seq_len:
                self._launch(1, SAMPLE)
        if self._queued < self._requested:
            raise RuntimeError("decode was called at the end of the context")

    def receive(self) -> tuple[int, ...]:
        """The tokens of the step that was requested last; waits for them.

        Raises:
            CheckpointError: their logits contain NaN or Inf.
            BackendError: the GPU failed, or the watchdog of the persistent kernel tripped.
        """
        if self._steps.closed:  # the ring is gone
            raise closed_error()
        try:
            return (self._ring.receive(self._requested, self._check),)
        except CheckpointError:
            self.distrust()
            with self._steps.current():
                self.check_watchdog()
            raise

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written. Steps that were queued ahead are discarded."""
        nothing_ahead = self._exact and self._requested == self._queued
        if nothing_ahead and position == self.position:
            return
        check_range("position", position, 0, self._max_seq_len)
        if self._steps.closed:
            raise closed_error()
        if nothing_ahead:
            self.position, self._moved = position, True
        else:
            with self._steps.current():
                self._settle(position)

    def distrust(self) -> None:
        """A step has failed: the next `seek` waits for all steps and counts what they have done."""
        self._exact = False

    def check_wide_step(self) -> None:
        """Raise if the watchdog tripped in a prompt's step of several tokens: unlike in a decode step, its token does
        not show that.
        """
        try:
            with self._steps.current():
                self.check_watchdog()
        except BackendError:
            self.distrust()
            raise

    @contextmanager
    def measuring(self, tokens: int = 1) -> Iterator[None]:
        """The body may run steps of so many tokens at the current position; afterwards the position is what it was."""
        position = self.position
        check_range("positions", position, tokens, self._max_seq_len)
        self._exact = False
        with self._steps.current():
            self._write_position()
            yield
            self._settle(position)

    def _settle(self, position: int) -> None:
        """Wait for all queued steps, count their tokens as received, and set the position."""
        self._exact = False
        self._steps.settle(position)
        self._moved = False
        self._queued = self._requested = self._steps.posted_tokens()
        self.position = position
        self._exact = True

    def _check(self) -> None:
        """Raise if the GPU has failed, or has finished all queued steps without posting the requested token."""
        with self._steps.current():
            if self._steps.finished() and self._steps.posted_tokens() < self._requested:
                raise RuntimeError("the GPU has finished without the token that was requested")
