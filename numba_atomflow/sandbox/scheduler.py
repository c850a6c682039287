"""Continuous batching: which tokens go through the model in the next step.

First come, first served. Every running request that has its prompt behind it gets one token per step; what is left of
the token budget goes to prompts in the order of arrival, in chunks if they are longer. A waiting request is admitted
when the blocks for all of its tokens are free. When a running one finds no block for its next token, the request that
came last gives its blocks back and waits at the front: it will be computed again (preemption by recompute), from
whatever of its beginning is still in the cache. The first of the running requests is never preempted for another, and
the whole cache is enough for any single request: so every admitted request finishes.
"""

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import ContextError, OptionError, OutOfBlocksError
from numba_atomflow.memory.paged import BlockCopy, BlockManager, BlockTable
from numba_atomflow.sandbox.requests import Request


@dataclass
class Chunk:
    """Tokens start .. stop - 1 of a request, which go through the model in one step."""

    request: Request
    start: int
    stop: int
    copies: list[BlockCopy]

    @property
    def needs_logits(self) -> bool:
        """Whether its last token's logits choose the next one."""
        return self.stop == self.request.length


@dataclass(frozen=True)
class Batch:
    """A step's tokens, a column each, whatever their sequence.

    Attributes:
        chunks: whose they are, in the order of the columns.
        tokens: int32 [columns].
        positions: int64 [columns], in their sequence.
        known: int64 [columns], positions of the sequence that earlier steps have written.
        rows: int64 [columns], row of the page table.
        slots: int64 [columns], where keys and values go.
        wanted: columns whose logits choose a token.
        copies: blocks to copy before anything is written, in this order.
    """

    chunks: list[Chunk]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int64]
    cached: NDArray[np.int64]
    table_rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    logits_indices: list[int]
    copies: list[BlockCopy]

    @property
    def token_count(self) -> int:
        return len(self.tokens)


class Scheduler:
    """Plans steps, and keeps account of blocks and page tables.

    Args:
        manager: of the cache's blocks. table: with a row for each of `max_sequences`.
        token_budget: columns of a step at most.
        max_sequences: requests that run at once, at most as many as a step has columns.

    Attributes:
        table_seconds: spent on page tables and slots so far, of what `plan` took.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(self, manager: BlockManager, table: BlockTable, token_budget: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= token_budget:
            raise OptionError(
                f"max_sequences is {max_sequences}; it must be 1 to {token_budget}, the tokens that a step takes."
            )
        self.manager, self.table = manager, table
        self.token_budget, self.max_sequences = token_budget, max_sequences
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.table_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Nothing is running or waiting."""
        return not self.running and not self.waiting

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextError: the whole cache is too small for it.
        """
        self.check(request)
        self.waiting.append(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Queue a request whose prompt begins with all that the parent has so far; it shares the parent's blocks.

        If the parent does not run, or as many requests run as may, the child waits like any other, and shares what it
        finds in the cache when its turn comes.

        Raises:
            ContextError: the whole cache is too small for it.
        """
        self.check(child)
        if parent not in self.running or len(self.running) == self.max_sequences:
            self.waiting.append(child)
            return
        written = self.manager.written(parent.id)
        if list(child.prompt[:written]) != parent.tokens(0, written) or len(child.prompt) <= written:
            raise ValueError("a fork's prompt begins with what its parent has written, and goes on")
        self.manager.fork(parent.id, child.id)
        child.shared_tokens += written
        self.running.append(child)

    def check(self, request: Request) -> None:
        """Raises:
        ContextError: the whole cache is too small for this request.
        """
        room = self.manager.block_count * self.manager.block_size
        if request.most_tokens > room:
            raise ContextError(
                f"Request {request.id} may come to {request.most_tokens} tokens, but the cache has "
                f"{self.manager.block_count} blocks of {self.manager.block_size}; give it more blocks."
            )

    # --- a step ------------------------------------------------------------------------------------------------------

    def plan(self) -> Batch | None:
        """The next step; None if there is nothing to do."""
        chunks: dict[int, Chunk] = {}
        for decoding in (True, False):
            for request in list(self.running):  # those preempted meanwhile are left out
                left = request.length - self.manager.length(request.id) if request in self.running else 0
                if left and (left == 1) == decoding:
                    self._grow(request, min(left, self.token_budget - _token_count(chunks)), chunks)
        self._admit(chunks)
        return self._batch(list(chunks.values())) if chunks else None

    def _grow(self, request: Request, count: int, chunks: dict[int, Chunk]) -> None:
        """Give a request's next tokens slots and a place in the step; those who came last make room if need be."""
        start = self.manager.length(request.id)
        while count > 0 and request in self.running:
            try:
                copies = self.manager.append(request.id, request.tokens(start, start + count))
            except OutOfBlocksError:
                self._preempt(chunks)
            else:
                chunks[request.id] = Chunk(request, start, start + count, copies)
                return

    def _preempt(self, chunks: dict[int, Chunk]) -> None:
        """Take the blocks of the request that came last."""
        victim = self.running.pop()
        chunks.pop(victim.id, None)
        self.manager.close(victim.id)
        self.table.release(victim.id)
        victim.preemptions += 1
        self.waiting.appendleft(victim)

    def _admit(self, chunks: dict[int, Chunk]) -> None:
        """Begin waiting requests while there are columns and blocks for all of their tokens."""
        while self.waiting and len(self.running) < self.max_sequences and _token_count(chunks) < self.token_budget:
            request = self.waiting[0]
            tokens = request.tokens(0, request.length)
            if self.manager.missing_blocks(tokens) > self.manager.free_count:
                return
            self.waiting.popleft()
            request.shared_tokens += self.manager.open(request.id, tokens)
            self.running.append(request)
            left = request.length - self.manager.length(request.id)
            self._grow(request, min(left, self.token_budget - _token_count(chunks)), chunks)

    def _batch(self, chunks: list[Chunk]) -> Batch:
        started = time.perf_counter()
        rows, slots = [], []
        for chunk in chunks:
            sequence = chunk.request.id
            self.table.update(sequence, self.manager.blocks(sequence))
            rows.append(self.table.row(sequence))
            slots.append(self.manager.slots(sequence, chunk.start, chunk.stop))
        self.table_seconds += time.perf_counter() - started
        counts = [chunk.stop - chunk.start for chunk in chunks]
        ends = np.cumsum(counts).tolist()
        return Batch(
            chunks,
            tokens=np.array([t for c in chunks for t in c.request.tokens(c.start, c.stop)], np.int32),
            positions=np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks]),
            cached=np.repeat(np.array([chunk.start for chunk in chunks]), counts),
            table_rows=np.repeat(np.array(rows), counts),
            slots=np.concatenate(slots),
            logits_indices=[end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.needs_logits],
            copies=[copy for chunk in chunks for copy in chunk.copies],
        )

    def finish_step(self, batch: Batch, tokens: list[int], now: float) -> list[Request]:
        """Take a step's tokens, one per wanted column; the requests that have ended."""
        chosen, ended = iter(tokens), []
        for chunk in batch.chunks:
            request = chunk.request
            self.manager.commit(request.id, chunk.stop)
            if not chunk.needs_logits:
                continue
            token = next(chosen)
            request.output.append(token)
            request.token_times.append(now)
            if token in request.end_tokens:
                request.finish_reason = "eos"
            elif len(request.output) == request.max_tokens:
                request.finish_reason = "max_tokens"
            if request.finish_reason is not None:
                self.running.remove(request)
                self.manager.close(request.id)
                self.table.release(request.id)
                ended.append(request)
        return ended


def _token_count(chunks: dict[int, Chunk]) -> int:
    return sum(chunk.stop - chunk.start for chunk in chunks.values())
