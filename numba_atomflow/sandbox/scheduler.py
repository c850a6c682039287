"""Continuous batching with chunked prefill: which tokens the next step computes.

First come, first served. Every running request in decode gets one token per step; the rest of the token budget goes to
prompts in the order of arrival, in chunks (chunked prefill). A waiting request is admitted when KV blocks for all of
its tokens are free. When no block is free for a running request's next token, the request admitted last is preempted:
its blocks are freed, and it waits at the front of the queue, to be recomputed (preemption by recompute) except for the
prefix that is then still in the cache. The first running request is never preempted for another one, and the whole
cache is enough for any single request: so every admitted request finishes.

Where a device takes many tokens of one sequence faster (the GEMM path of a GPU), a prompt of which more is left than a
step's budget has steps of its own, by turns with those of the requests that decode.
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
    """Tokens start .. stop - 1 of a request, computed in one step."""

    request: Request
    start: int
    stop: int
    copies: list[BlockCopy]

    @property
    def needs_logits(self) -> bool:
        """Whether the next token is sampled from its last token's logits."""
        return self.stop == self.request.length


@dataclass(frozen=True)
class Batch:
    """The tokens of a step, of any sequences.

    Attributes:
        chunks: of the requests, in the order of the tokens.
        tokens: int32 [token_count].
        positions: int64 [token_count], in their sequence.
        cached: int64 [token_count], positions of the sequence that are in the cache before this step.
        table_rows: int64 [token_count], rows of the block table.
        slots: int64 [token_count], that keys and values are written to.
        logits_indices: tokens whose logits a next token is sampled from.
        copies: KV blocks to copy before anything is written (copy-on-write), in this order.
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
    """Plans steps, and allocates KV blocks and rows of the block table for them.

    Args:
        manager: of the KV blocks. table: with a row for each of `max_sequences`.
        token_budget: the most tokens of a step.
        max_sequences: the most running requests, at most `token_budget`.
        prefill_chunk: the most tokens of a step that is a part of one prompt; 0: there are no such steps.

    Attributes:
        table_seconds: spent on block tables and slots so far, a part of what `plan` took.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(
        self, manager: BlockManager, table: BlockTable, token_budget: int, max_sequences: int, prefill_chunk: int = 0
    ) -> None:
        if not 1 <= max_sequences <= token_budget:
            raise OptionError(
                f"max_sequences is {max_sequences}; it must be 1 to {token_budget}, the tokens of a step."
            )
        self.manager, self.table = manager, table
        self.token_budget, self.max_sequences, self.prefill_chunk = token_budget, max_sequences, prefill_chunk
        self._decodes_next = False  # the last step was a prompt's: those that decode have their turn
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of admission
        self.table_seconds = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is running or waiting."""
        return not self.running and not self.waiting

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextError: it needs more than the whole KV cache.
        """
        self.check(request)
        self.waiting.append(request)

    def fork(self, parent: Request, child: Request) -> None:
        """Queue a request whose prompt begins with all tokens of the parent so far; it shares the parent's blocks.

        If the parent is not running, or `max_sequences` requests are, the child waits like any other, and shares blocks
        by prefix caching when it is admitted.

        Raises:
            ContextError: it needs more than the whole KV cache.
        """
        self.check(child)
        if parent not in self.running or len(self.running) == self.max_sequences:
            self.waiting.append(child)
            return
        written = self.manager.written(parent.id)
        if list(child.prompt[:written]) != parent.tokens(0, written) or len(child.prompt) <= written:
            raise ValueError("a fork's prompt must begin with its parent's cached tokens, and be longer")
        self.manager.fork(parent.id, child.id)
        child.shared_tokens += written
        self.running.append(child)

    def check(self, request: Request) -> None:
        """Raises:
        ContextError: the request needs more than the whole KV cache.
        """
        slots = self.manager.block_count * self.manager.block_size
        if request.most_tokens > slots:
            raise ContextError(
                f"Request {request.id} may reach {request.most_tokens} tokens, but the cache has "
                f"{self.manager.block_count} blocks of {self.manager.block_size}; give it more blocks."
            )

    # --- a step ------------------------------------------------------------------------------------------------------

    def plan(self) -> Batch | None:
        """The next step; None if no request is running or waiting."""
        chunks = self._plan_prompt() or self._plan_mixed()
        return self._batch(list(chunks.values())) if chunks else None

    def _plan_mixed(self) -> dict[int, Chunk]:
        """A step of any sequences' tokens."""
        chunks: dict[int, Chunk] = {}
        self._decodes_next = False
        for decoding in (True, False):
            for request in list(self.running):  # a request may be preempted during this loop
                left = self._left(request) if request in self.running else 0
                if left and (left == 1) == decoding:
                    self._grow(request, min(left, self.token_budget - _token_count(chunks)), chunks)
        self._admit(chunks)
        return chunks

    def _plan_prompt(self) -> dict[int, Chunk]:
        """A step of one prompt's tokens, more than the budget; empty where there is none, or others have their turn."""
        chunks: dict[int, Chunk] = {}
        if not self.prefill_chunk or (self._decodes_next and any(self._left(r) == 1 for r in self.running)):
            return chunks
        prompts = [request for request in self.running if self._left(request) > self.token_budget]
        if not prompts and (admitted := self._admit_next()) and self._left(admitted) > self.token_budget:
            prompts = [admitted]
        if prompts:
            self._grow(prompts[0], min(self._left(prompts[0]), self.prefill_chunk), chunks)
            self._decodes_next = True
        return chunks

    def _left(self, request: Request) -> int:
        """Tokens of a running request that are not in the cache."""
        return request.length - self.manager.length(request.id)

    def _grow(self, request: Request, count: int, chunks: dict[int, Chunk]) -> None:
        """Add a request's next tokens to the step; requests admitted later are preempted if blocks are missing."""
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
        """Free the blocks of the running request that was admitted last, and queue it first."""
        victim = self.running.pop()
        chunks.pop(victim.id, None)
        self.manager.close(victim.id)
        self.table.release(victim.id)
        victim.preemptions += 1
        self.waiting.appendleft(victim)

    def _admit(self, chunks: dict[int, Chunk]) -> None:
        """Admit waiting requests while there is token budget."""
        while _token_count(chunks) < self.token_budget:
            request = self._admit_next()
            if request is None:
                return
            self._grow(request, min(self._left(request), self.token_budget - _token_count(chunks)), chunks)

    def _admit_next(self) -> Request | None:
        """Admit the next waiting request, if `max_sequences` and the KV blocks for all of its tokens allow."""
        if not self.waiting or len(self.running) == self.max_sequences:
            return None
        request = self.waiting[0]
        tokens = request.tokens(0, request.length)
        if self.manager.missing_blocks(tokens) > self.manager.free_count:
            return None
        self.waiting.popleft()
        request.shared_tokens += self.manager.open(request.id, tokens)
        self.running.append(request)
        return request

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
        """Append a step's tokens, one for each of `batch.logits_indices`; returns the requests that finished."""
        sampled, ended = iter(tokens), []
        for chunk in batch.chunks:
            request = chunk.request
            self.manager.commit(request.id, chunk.stop)
            if not chunk.needs_logits:
                continue
            token = next(sampled)
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
