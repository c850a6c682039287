"""The serving loop: admit requests at their arrival times, plan and run steps. There is no network.

Time is that of a simulated clock: each step advances it by the measured duration of the step, and when the engine is
idle it jumps to the next arrival. Replaying a trace of an hour takes only as long as its steps.
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
    """One step: what it computed, and the seconds that scheduler, block tables and model took.

    Attributes:
        now: the clock after the step, in seconds.
        batched_tokens: tokens of the step's batch, of prompts and generations.
        generated_tokens: that the step sampled.
        running, waiting: requests. used_blocks: KV blocks with references, after planning.
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
    """A request that continues another one's generation, and shares its KV blocks.

    Attributes:
        parent: id of that request.
        after: the fork is submitted when the parent has generated this many tokens, or has finished.
        tokens: appended to the parent's tokens, at least one.
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
        runner: prepared; the caller closes it.
        token_budget: the most tokens of a step. If None, `runner.max_batched_tokens`, and long prompts have steps of
            their own with up to `runner.prefill_chunk`.
        max_sequences: the most running requests; if None, the rows of the block table, up to the token budget.
        block_order: in which KV blocks are first allocated.

    Attributes:
        now: the simulated clock, in seconds.
        steps: all steps so far. finished: requests in the order in which they ended.

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
            raise OptionError(f"max_sequences is {sequences}; the block table has {rows} rows.")
        self.runner = runner
        self.manager = BlockManager(runner.sizes.slots // runner.block_size, runner.block_size, block_order)
        chunk = runner.prefill_chunk if token_budget is None else 0
        self.scheduler = Scheduler(self.manager, BlockTable(runner.block_table), budget, sequences, chunk)
        self.now = 0.0
        self.steps: list[StepRecord] = []
        self.finished: list[Request] = []

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextError: it needs more than the whole KV cache.
            OptionError: it has no prompt, asks for no tokens, or is longer than a sequence may be.
        """
        self._check(request)
        self.scheduler.submit(request)

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise OptionError(f"Request {request.id} has an empty prompt or max_tokens below 1; give it both.")
        if request.most_tokens > self.runner.sizes.longest:
            raise OptionError(
                f"Request {request.id} may reach {request.most_tokens} tokens; sequences here have at most "
                f"{self.runner.sizes.longest}, make it shorter."
            )
        self.scheduler.check(request)

    def step(self) -> list[Request]:
        """Plan and run one step; returns the requests that it finished. Does nothing when no request is there."""
        scheduler, table_before = self.scheduler, self.scheduler.table_seconds
        started = time.perf_counter()
        batch = scheduler.plan()
        if batch is None:
            return []
        used_blocks, planned = self.manager.used_count, time.perf_counter()
        self.runner.block_table_changed(scheduler.table.dirty)
        scheduler.table.clean()
        ready = time.perf_counter()
        tokens = self.runner.run(batch)
        ran = time.perf_counter()
        finished = scheduler.finish_step(batch, tokens, self.now + ran - started)
        end = time.perf_counter()
        self.now += end - started
        slots = scheduler.table_seconds - table_before  # part of planning
        self.steps.append(
            StepRecord(
                now=self.now,
                batched_tokens=batch.token_count,
                generated_tokens=len(tokens),
                running=len(scheduler.running) + len(finished),
                waiting=len(scheduler.waiting),
                used_blocks=used_blocks,
                schedule_seconds=planned - started - slots + end - ran,
                table_seconds=slots + ready - planned,
                model_seconds=ran - ready,
            )
        )
        self.finished += finished
        return finished

    def serve(
        self,
        requests: Sequence[Request],
        forks: Sequence[Fork] = (),
        progress: Progress | None = None,
    ) -> list[Request]:
        """Serve requests from their arrival times, and their forks, until all have finished; returns them by id.

        Raises:
            ContextError, OptionError: as `submit`, before anything runs; of a fork, when it is submitted.
        """
        arrivals = sorted(requests, key=lambda request: request.arrival)
        for request in arrivals:
            self._check(request)
        by_id = {request.id: request for request in requests}
        pending, total, done = list(forks), len(requests) + len(forks), 0
        while arrivals or pending or not self.scheduler.idle:
            if self.scheduler.idle and arrivals:
                self.now = max(self.now, arrivals[0].arrival)
            while arrivals and arrivals[0].arrival <= self.now:
                self.submit(arrivals.pop(0))
            done += len(self.step())
            for fork in [fork for fork in pending if _is_due(fork, by_id)]:
                pending.remove(fork)
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
