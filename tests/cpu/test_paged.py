"""Block manager of the paged KV cache: random histories of operations, checked against a cache that stores tokens."""

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numba_atomflow.errors import OutOfBlocksError
from numba_atomflow.memory.paged import BlockManager, BlockTable

HISTORIES = int(os.environ.get("ATOMFLOW_HISTORIES", "3000"))


class Cache:
    """A manager, and a cache in which every slot stores all tokens up to its position.

    Whatever a sequence would read must be its own tokens; and no write may change what another sequence reads.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        self.manager = BlockManager(blocks, block_size)
        self.slots: dict[int, tuple[int, ...]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def open(self, prompt: list[int]) -> int:
        sequence = self.new_id()
        missing, free = self.manager.missing_blocks(prompt), self.manager.free_count
        shared = self.manager.open(sequence, prompt)
        taken = free - self.manager.free_count  # free blocks that hold a prefix of the prompt
        assert missing == taken + self.manager.blocks_for(len(prompt)) - shared // self.manager.block_size
        assert shared < len(prompt)
        assert shared % self.manager.block_size == 0
        self.tokens[sequence] = prompt[:shared]
        return sequence

    def append(self, sequence: int, tokens: list[int]) -> bool:
        manager, before = self.manager, list(self.manager.blocks(sequence))
        free = manager.free_count
        start = manager.length(sequence)
        try:
            copies = manager.append(sequence, tokens)
        except OutOfBlocksError:
            assert manager.blocks(sequence) == before
            assert manager.free_count == free
            assert manager.length(sequence) == start
            return False
        size = manager.block_size
        for copy in copies:
            for i in range(size):
                if copy.source * size + i in self.slots:
                    self.slots[copy.target * size + i] = self.slots[copy.source * size + i]
        self.tokens[sequence] += tokens
        for position, slot in enumerate(manager.slots(sequence, start, start + len(tokens)).tolist(), start):
            assert manager.references(slot // size) == 1, "wrote into a shared block"
            self.slots[slot] = tuple(self.tokens[sequence][: position + 1])
        manager.commit(sequence, start + len(tokens))
        return True

    def fork(self, parent: int) -> int:
        child = self.new_id()
        self.manager.fork(parent, child)
        self.tokens[child] = list(self.tokens[parent])
        return child

    def close(self, sequence: int) -> None:
        self.manager.close(sequence)
        del self.tokens[sequence]

    def check(self) -> None:
        self.manager.audit()
        assert self.manager.free_count + self.manager.used_count == self.manager.block_count
        for sequence, tokens in self.tokens.items():
            slots = self.manager.slots(sequence, 0, len(tokens)).tolist()
            assert [self.slots[slot] for slot in slots] == [tuple(tokens[: i + 1]) for i in range(len(tokens))]


@settings(max_examples=HISTORIES, deadline=None)
@given(blocks=st.integers(1, 12), block_size=st.integers(1, 5), history=st.binary(max_size=60))
@example(blocks=4, block_size=2, history=bytes([0, 40, 1, 9, 2, 0, 1, 3, 1, 3, 3, 0, 3, 0]))
def test_any_history(blocks: int, block_size: int, history: bytes) -> None:
    """Pairs of bytes are operations. There are two different tokens only: common prefixes are frequent."""
    cache = Cache(blocks, block_size)
    for operation, value in zip(history[::2], history[1::2], strict=False):
        alive = list(cache.tokens)
        if operation % 4 == 0 or not alive:
            prompt = [(value >> i) & 1 for i in range(1 + value % 9)]
            sequence = cache.open(prompt)
            if not cache.append(sequence, prompt[cache.manager.length(sequence) :]):
                cache.close(sequence)
        else:
            chosen = alive[value // 4 % len(alive)]
            if operation % 4 == 1:
                cache.append(chosen, [(value >> i) & 1 for i in range(1 + value % 4)])
            elif operation % 4 == 2:
                cache.fork(chosen)
            else:
                cache.close(chosen)
        cache.check()
    for sequence in list(cache.tokens):
        cache.close(sequence)
    cache.check()
    assert cache.manager.free_count == blocks


def test_prefix_caching_also_after_the_end_of_a_sequence() -> None:
    manager = BlockManager(8, 4)
    manager.open(1, list(range(10)))
    manager.append(1, list(range(10)))
    assert manager.open(2, list(range(10))) == 0  # nothing is in the cache yet
    manager.close(2)
    manager.commit(1, 10)
    assert manager.open(2, [0, 1, 2, 3, 9, 9]) == 4
    assert manager.open(3, list(range(8))) == 4  # not all: the last token's logits are needed
    assert manager.blocks(2)[0] == manager.blocks(3)[0] == manager.blocks(1)[0]
    for sequence in (1, 2, 3):
        manager.close(sequence)
    assert manager.free_count == 8
    assert manager.open(4, list(range(10))) == 8
    manager.audit()


def test_copy_on_write_of_a_shared_block_but_not_by_its_last_owner() -> None:
    manager = BlockManager(4, 4)
    manager.open(1, [5, 6])
    manager.append(1, [5, 6])
    manager.commit(1, 2)
    manager.fork(1, 2)
    (block,) = manager.blocks(1)
    (copy,) = manager.append(2, [7])
    assert (copy.source, copy.target) == (block, manager.blocks(2)[0])
    assert manager.append(1, [8]) == []
    assert manager.copies == 1


def test_an_error_with_the_numbers_when_blocks_run_out() -> None:
    manager = BlockManager(2, 8)
    manager.open(1, [0])
    with pytest.raises(OutOfBlocksError, match=r"3 more blocks of 8 positions are needed, but 2 of 2 are free; "):
        manager.append(1, list(range(20)))


def test_a_block_table_row_writes_only_changed_entries() -> None:
    table = BlockTable(np.full((2, 6), -1, np.int32))
    table.update(10, [3, 4])
    table.update(11, [5])
    assert table.array[table.row(10)].tolist() == [3, 4, -1, -1, -1, -1]
    table.clean()
    table.update(10, [3, 4])
    assert table.dirty == {}
    table.update(10, [3, 9, 1])  # the last block was shared and is copied
    assert table.dirty == {table.row(10): (1, 3)}
    assert table.array[table.row(10), :3].tolist() == [3, 9, 1]
    row = table.row(10)
    table.release(10)
    table.update(12, [7])
    assert table.row(12) == row
    with pytest.raises(IndexError):
        table.row(13)
