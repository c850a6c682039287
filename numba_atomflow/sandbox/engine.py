"""The server: requests come, steps are planned and run, replies go. No network: the clock is the work's own.

The clock stands still while nothing is to be done until the next arrival, and otherwise moves by what each step took:
a trace of an hour takes as long as its work.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from numba_atomflow.errors import OptionError
from numba_atomflow.memory.paged import BlockManager, BlockTable
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import StepRunner
from numba_atomflow.sandbox.scheduler import Scheduler
from numba_atomflow.utils.progress import Progress


@dataclass(frozen=True)
class StepRecord:
    """What a step did and took: seconds of the scheduler, of page tables and slots, of the model.

    Attributes:
        now: the server's clock after it.
        columns: tokens that went through the model. tokens: that came out.
        running, waiting: requests. used_blocks: after the plan was made.
    """

    now: float
    batched_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    used_blocks: int
    schedule_seconds: float
    table_seconds: float
    model_seconds: float


@dataclass(frozen=True)
class Fork:
    """A request that goes on from another one's reply.

    Attributes:
        parent: id of that request. after: tokens of its reply that must be there; or all of it, if it ends before.
        tokens: that follow, at least one.
    """

    id: int
    parent: int
    after: int
    tokens: Sequence[int]
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()


class ServingEngine:
    """Serves requests with one runner.

    Args:
        runner: prepared; it is the caller's to close.
        token_budget: columns of a step; as many as the runner takes, if None.
        max_sequences: requests that run at once; as many as the page table has rows, but no more than columns, if None.
        block_order: in which blocks are handed out at first.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(
        self,
        runner: StepRunner,
        token_budget: int | None = None,
        max_sequences: int | None = None,
        block_order: Sequence[int] | None = None,
    ) -> None:
        budget = runner.max_batched_tokens if token_budget is None else token_budget
        if not 1 <= budget <= runner.max_batched_tokens:
            raise OptionError(f"token_budget is {budget}; a step here takes 1 to {runner.max_batched_tokens} tokens.")
        rows = runner.sizes.sequences
        sequences = min(rows, budget) if max_sequences is None else max_sequences
        if sequences > rows:
            raise OptionError(f"max_sequences is {sequences}; the page table has {rows} rows.")
        self.runner = runner
        self.manager = BlockManager(runner.sizes.slots // runner.block_size, runner.block_size, block_order)
        self.scheduler = Scheduler(self.manager, BlockTable(runner.block_table), budget, sequences)
        self.now = 0.0
        self.steps: list[StepRecord] = []
        self.finished: list[Request] = []

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextError: the whole cache is too small for it.
            OptionError: it is empty, wants no tokens, or is longer than the model allows.
        """
        self._check(request)
        self.scheduler.submit(request)

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise OptionError(f"Request {request.id} has no prompt, or wants no tokens; give it both.")
        if request.most_tokens > self.runner.sizes.longest:
            raise OptionError(
                f"Request {request.id} may come to {request.most_tokens} tokens; sequences here have at most "
                f"{self.runner.sizes.longest}, make it shorter."
            )
        self.scheduler.check(request)

    def step(self) -> list[Request]:
        """Plan and run one step; the requests that ended with it. Does nothing if there is nothing to do."""
        scheduler, table_before = self.scheduler, self.scheduler.table_seconds
        started = time.perf_counter()
        batch = scheduler.plan()
        if batch is None:
            return []
        used, planned = self.manager.used_count, time.perf_counter()
        self.runner.block_table_changed(scheduler.table.dirty)
        scheduler.table.clean()
        ready = time.perf_counter()
        tokens = self.runner.run(batch)
        ran = time.perf_counter()
        ended = scheduler.finish_step(batch, tokens, self.now + ran - started)
        done = time.perf_counter()
        self.now += done - started
        slots = scheduler.table_seconds - table_before  # of the plan
        self.steps.append(
            StepRecord(
                now=self.now,
                batched_tokens=batch.token_count,
                generated_tokens=len(tokens),
                running=len(scheduler.running) + len(ended),
                waiting=len(scheduler.waiting),
                used_blocks=used,
                schedule_seconds=planned - started - slots + done - ran,
                table_seconds=slots + ready - planned,
                model_seconds=ran - ready,
            )
        )
        self.finished += ended
        return ended

    def serve(
        self,
        requests: Sequence[Request],
        forks: Sequence[Fork] = (),
        progress: Progress | None = None,
    ) -> list[Request]:
        """Serve requests, each from its arrival on, and forks of them, to their ends; all of them, in order of id.

        Raises:
            ContextError, OptionError: as `submit`; nothing has been run then.
        """
        coming = sorted(requests, key=lambda request: request.arrival)
        for request in coming:
            self._check(request)
        by_id = {request.id: request for request in requests}
        left, total, done = list(forks), len(requests) + len(forks), 0
        while coming or left or not self.scheduler.idle:
            if self.scheduler.idle and coming:
                self.now = max(self.now, coming[0].arrival)
            while coming and coming[0].arrival <= self.now:
                self.submit(coming.pop(0))
            done += len(self.step())
            for fork in [fork for fork in left if _is_due(fork, by_id)]:
                left.remove(fork)
                by_id[fork.id] = self._fork(fork, by_id[fork.parent])
            if progress:
                progress("requests", done, total)
        return [by_id[key] for key in sorted(by_id)]

    def _fork(self, fork: Fork, parent: Request) -> Request:
        prompt = [*parent.tokens(0, parent.length), *fork.tokens]
        child = Request(fork.id, prompt, fork.max_tokens, fork.end_tokens, self.now)
        self._check(child)
        self.scheduler.fork(parent, child)
        return child


def _is_due(fork: Fork, requests: dict[int, Request]) -> bool:
    parent = requests.get(fork.parent)
    return parent is not None and (len(parent.output) >= fork.after or parent.finish_reason is not None)
