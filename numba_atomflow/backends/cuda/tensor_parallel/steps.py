"""The steps of all ranks together, as a queue of steps runs them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.graphs import is_decode
from numba_atomflow.backends.cuda.persistent import watchdog_error
from numba_atomflow.backends.cuda.queue import stream_finished
from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank
from numba_atomflow.backends.cuda.tensor_parallel.timeline import merged
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.model.step import Head
from numba_atomflow.utils.interrupts import deferred_interrupts
from numba_atomflow.utils.progress import OpenBar, Progress


class RankSteps:
    """Steps that all ranks run, each launched on all of them at once: a rank's kernel waits for the others'.

    Attributes:
        greedy: the most likely token is the next one. logprobs: steps that sample compute log-probabilities, too.
        open_bar: opens a progress bar for kernels that are compiled when they are first needed.
    """

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self.greedy, self.logprobs = True, False
        self.open_bar: OpenBar = nullcontext
        self._ready = set[int]()  # widths whose kernels are loaded

    @property
    def closed(self) -> bool:
        """Whether the memory has been given back."""
        return any(rank.owner.closed for rank in self.ranks)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Each rank has a context of its own, which is made current for it alone."""
        yield

    def run(self, tokens: int, head: Head) -> None:
        """Launch a step of one token; or of several, a prompt's, which `send` has made ready."""
        if tokens > 1:
            self.on_all(lambda rank: rank.columns.run_prompt(tokens, head, logprobs=self.logprobs))
        elif is_decode(tokens, head):
            self.on_all(lambda rank: rank.run_decode(greedy=self.greedy, logprobs=self.logprobs))
        else:
            self.on_all(Rank.run_prompt)

    def on_all(self, launch: Callable[[Rank], None]) -> None:
        """Launch something on every rank. Ctrl-C waits: a step that some ranks lack would end by the watchdog."""
        with deferred_interrupts():
            for rank in self.ranks:
                with rank.owner.current():
                    launch(rank)

    def run_head(self) -> None:
        """The logits of the last step, on every rank; waits for them.

        Raises:
            BackendError: a watchdog tripped, in that step or before.
        """
        self.on_all(Rank.run_head)
        self.wait()
        self.check_watchdog()

    def send(self, tokens: Sequence[int]) -> None:
        """The tokens of the next step, a prompt's. The first of several of a width loads its kernel."""
        if len(tokens) > 1:
            self.prepare_widths([self.ranks[0].columns.width_for(len(tokens))])
        for rank in self.ranks:
            with rank.owner.current():
                if len(tokens) > 1:
                    rank.columns.send(tokens, 0)
                else:
                    rank.send(tokens[0])

    def prepare_widths(self, widths: Sequence[int]) -> None:
        """Load the kernels of steps of so many tokens on every rank, unless they are; no step runs meanwhile."""
        missing = [width for width in widths if width > 1 and width not in self._ready]
        if not missing:
            return
        self.wait()
        for rank in self.ranks:
            with rank.owner.current():
                rank.columns.load(missing, self.open_bar)
        self._ready |= set(missing)

    def wait(self) -> None:
        """Wait for all steps.

        Raises:
            DriverError: a GPU failed.
        """
        for rank in self.ranks:
            with rank.owner.current():
                rank.wait()

    def trace(self) -> NDArray[np.float64]:
        """Run a traced step, which `prepare_trace` has made ready; times [CTAs of all ranks, ops, EVENTS]."""
        for rank in self.ranks:
            with rank.owner.current():
                rank.clear_times()
        self.on_all(Rank.run_traced)
        self.wait()
        times = []
        for rank in self.ranks:
            with rank.owner.current():
                times.append(rank.read_times())
        return merged(times)

    def prepare_trace(self, progress: Progress | None) -> None:
        """Load the kernel that writes timestamps on every rank."""
        for rank in self.ranks:
            with rank.owner.current():
                rank.bind_traced(progress)

    def set_position(self, position: int) -> None:
        """The position at which the next token is written."""
        for rank in self.ranks:
            with rank.owner.current():
                rank.set_position(position)

    def settle(self, position: int) -> None:
        """Wait for all steps, and give all ranks the same state: after a failure some may have completed more steps."""
        self.wait()
        steps, posted = 0, 0
        for rank in self.ranks:
            with rank.owner.current():
                steps, posted = max(steps, rank.steps()), max(posted, rank.posted_tokens())
        for rank in self.ranks:
            with rank.owner.current():
                rank.restart(steps + 1, position)
                rank.set_posted_tokens(posted)
        self.wait()  # a peer's next step must not store into vectors that are not clear yet

    def posted_tokens(self) -> int:
        """Tokens posted to the host so far, by rank 0."""
        with self.ranks[0].owner.current():
            return self.ranks[0].posted_tokens()

    def check_watchdog(self) -> None:
        """Raise if a watchdog tripped on any rank."""
        for rank in self.ranks:
            with rank.owner.current():
                if rank.faulty():
                    raise watchdog_error("--gpus 1")

    def finished(self) -> bool:
        """Whether all steps of all ranks have ended."""
        done = True
        for rank in self.ranks:
            with rank.owner.current():
                done = stream_finished(rank.stream) and done
        return done

    def close(self) -> None:
        """Wait for all ranks before the memory of any is freed: peers write to it."""
        for rank in self.ranks:
            with suppress(AtomFlowError), rank.owner.current():  # after a failure every call reports it
                rank.wait()
        for rank in self.ranks:
            rank.owner.close()
