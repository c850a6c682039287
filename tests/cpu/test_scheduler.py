"""Continuous batching with a trivial model: every request generates the same tokens as alone."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.memory.paged import BlockManager, BlockTable
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.scheduler import Batch, Scheduler

HISTORIES = int(os.environ.get("ATOMFLOW_HISTORIES", "2000"))
VOCABULARY = 3  # common prefixes are frequent


def reply(tokens: tuple[int, ...], count: int, end: int | None) -> list[int]:
    """The generation of a request alone: each token is a function of all tokens before it."""
    out: list[int] = []
    while len(out) < count and (not out or out[-1] != end):
        out.append(hash((*tokens, *out)) % VOCABULARY)
    return out


class Model:
    """Reads all earlier tokens of a sequence through the block table, as attention does."""

    def __init__(self, blocks: int, block_size: int, budget: int, sequences: int, chunk: int = 0) -> None:
        self.manager = BlockManager(blocks, block_size)
        self.table = BlockTable(np.full((sequences, blocks), -1, np.int32))
        self.scheduler = Scheduler(self.manager, self.table, budget, sequences, chunk)
        self.slots = np.full(blocks * block_size, -1)
        self.now = 0.0

    def run(self, batch: Batch) -> list[int]:
        size = self.manager.block_size
        for copy in batch.copies:
            source = self.slots[copy.source * size : (copy.source + 1) * size]
            self.slots[copy.target * size : (copy.target + 1) * size] = source
        assert len(set(batch.slots.tolist())) == batch.token_count, "two tokens write to one slot"
        for chunk in batch.chunks:
            blocks = self.manager.blocks(chunk.request.id)
            written = {p // size for p in range(chunk.start, chunk.stop)}
            assert all(self.manager.references(blocks[i]) == 1 for i in written), "a write to a shared block"
        self.slots[batch.slots] = batch.tokens
        tokens = []
        for index in batch.logits_indices:
            positions = np.arange(batch.positions[index] + 1)
            blocks = self.table.array[batch.table_rows[index]]
            past = self.slots[blocks[positions // size] * size + positions % size]
            tokens.append(hash(tuple(past.tolist())) % VOCABULARY)
        return tokens

    def step(self) -> list[Request]:
        batch = self.scheduler.plan()
        assert batch is not None, "no batch although requests are waiting"
        if batch.token_count > self.scheduler.token_budget:
            assert len(batch.chunks) == 1, "a step of more tokens than the budget is one prompt's"
            assert batch.token_count <= self.scheduler.prefill_chunk
        assert batch.token_count >= 1
        assert len(self.scheduler.running) <= self.scheduler.max_sequences
        self.now += 1
        ended = self.scheduler.finish_step(batch, self.run(batch), self.now)
        self.manager.audit()
        return ended


@settings(max_examples=HISTORIES, deadline=None)
@given(
    blocks=st.integers(2, 12),
    block_size=st.integers(1, 4),
    budget=st.integers(1, 6),
    sequences=st.integers(1, 6),
    chunk=st.sampled_from([0, 7, 16]),
    history=st.binary(min_size=1, max_size=30),
)
def test_any_history(blocks: int, block_size: int, budget: int, sequences: int, chunk: int, history: bytes) -> None:
    """Bytes are arrivals, forks and steps. Each request ends with the tokens that it generates alone."""
    model = Model(blocks, block_size, budget, min(sequences, budget), chunk)
    capacity, requests = blocks * block_size, []
    for number, value in enumerate(history):
        end = 0 if value & 8 else None
        ends = frozenset() if end is None else frozenset([end])
        parents = [r for r in model.scheduler.running if r.output and r.length + 2 <= capacity]
        if value % 4 == 0:
            prompt = [(value >> i) % VOCABULARY for i in range(1 + min(value // 16, capacity - 2))]
            request = Request(number, prompt, 1 + min(value // 8 % 8, capacity - len(prompt) - 1), ends, model.now)
            model.scheduler.submit(request)
            requests.append(request)
        elif value % 4 == 1 and parents:
            parent = parents[value // 4 % len(parents)]
            prompt = [*parent.tokens(0, parent.length), value % VOCABULARY]
            child = Request(number, prompt, 1 + min(value // 8 % 8, capacity - len(prompt) - 1), ends, model.now)
            model.scheduler.fork(parent, child)
            requests.append(child)
        elif not model.scheduler.idle:
            model.step()
    steps = 0
    while not model.scheduler.idle:
        model.step()
        steps += 1
        assert steps < 10_000, "it does not come to an end"
    assert model.manager.free_count == blocks
    for request in requests:
        assert request.output == reply(tuple(request.prompt), request.max_tokens, 0 if request.end_tokens else None)
        assert request.finish_reason == ("eos" if request.output[-1] in request.end_tokens else "max_tokens")
        assert request.token_times == sorted(request.token_times)


def test_chunked_prefill_beside_decode() -> None:
    model = Model(20, 4, budget=4, sequences=3)
    model.scheduler.submit(Request(1, [0], 20))
    model.step()
    model.scheduler.submit(Request(2, [1] * 9, 1))
    batches = [model.scheduler.plan()]
    for batch in batches:
        assert batch is not None
        assert [(chunk.request.id, chunk.stop - chunk.start) for chunk in batch.chunks] == [(1, 1), (2, 3)]
        assert batch.logits_indices == [0]
        assert batch.cached.tolist() == [1, 0, 0, 0]
        assert batch.positions.tolist() == [1, 0, 1, 2]


def test_a_long_prompt_has_steps_of_its_own_by_turns_with_decode() -> None:
    model = Model(40, 4, budget=4, sequences=3, chunk=16)
    model.scheduler.submit(Request(1, [0], 20))
    model.step()
    model.scheduler.submit(Request(2, [1] * 37, 2))
    model.scheduler.submit(Request(3, [2] * 3, 1))
    steps = []
    for _ in range(6):
        batch = model.scheduler.plan()
        assert batch is not None
        steps.append([(chunk.request.id, chunk.stop - chunk.start) for chunk in batch.chunks])
        model.scheduler.finish_step(batch, model.run(batch), 0.0)
    # What is left of the prompt after a turn of those that decode may take the rest of their steps' budget.
    assert steps == [
        [(2, 16)],
        [(1, 1), (2, 3)],
        [(2, 16)],
        [(1, 1), (2, 2), (3, 1)],
        [(1, 1), (2, 1), (3, 2)],
        [(1, 1)],
    ]


def test_a_prefix_hit_and_a_fork_compute_only_new_tokens() -> None:
    model = Model(20, 2, budget=8, sequences=3)
    first = Request(1, [0, 1, 2, 0, 1], 6)
    model.scheduler.submit(first)
    model.step()
    again, child = Request(2, first.prompt, 1), Request(3, [*first.tokens(0, 6), 2], 2)
    model.scheduler.submit(again)
    model.scheduler.fork(first, child)
    batch = model.scheduler.plan()
    assert batch is not None
    assert [(c.request.id, c.start, c.stop) for c in batch.chunks] == [(1, 5, 6), (3, 5, 7), (2, 4, 5)]
    assert (again.shared_tokens, child.shared_tokens) == (4, 5)
    assert len(batch.copies) == 1
    assert model.manager.used_count == 2 + 1 + 2 + 1  # two full blocks shared by all, and each one's last


def test_the_request_admitted_last_is_preempted_and_recomputed() -> None:
    model = Model(4, 2, budget=4, sequences=2)
    first, second = Request(1, [0, 1, 2], 5), Request(2, [2, 2], 6)
    for request in (first, second):
        model.scheduler.submit(request)
    order = []
    while not model.scheduler.idle:
        order += [request.id for request in model.step()]
    assert order == [1, 2]
    assert first.preemptions == 0
    assert second.preemptions >= 1
    assert second.output == reply((2, 2), 6, None)


def test_a_request_larger_than_the_cache_is_refused_at_submission() -> None:
    model = Model(4, 2, budget=4, sequences=2)
    with pytest.raises(ContextError, match=r"Request 7 may reach 9 tokens, but the cache has 4 blocks of 2; give"):
        model.scheduler.submit(Request(7, [0] * 4, 5))
    assert model.scheduler.idle
    with pytest.raises(OptionError, match="max_sequences is 5; it must be 1 to 4"):
        Model(4, 2, budget=4, sequences=5)
