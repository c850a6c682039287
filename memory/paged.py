"""The paged KV cache: allocation of KV blocks, prefix caching, copy-on-write, and block tables.

The cache of a layer is an array of slots [blocks * block_size, kv_dim]; a KV block is `block_size` neighbouring slots,
the same ones in every layer. The blocks of a sequence are its row of the block table: position p lies in slot
``blocks[p // block_size] * block_size + p % block_size``. `BlockManager` counts references to blocks. Sequences with a
common prefix share its full blocks (prefix caching), a fork shares all blocks of its parent, and a write to a shared
block goes to a copy of it (copy-on-write).

A block without references stays in the prefix cache until it is allocated again. Blocks are allocated in the order in
which they were freed (LRU).
Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OutOfBlocksError
from numba_atomflow.memory.plan import Buffer

BLOCK_SIZES = (8, 16, 32, 64, 128)  # positions per KV block that kernels support


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy-on-write: `source` is to be copied to `target`, in every layer, before the step writes to `target`."""

    source: int
    target: int


@dataclass
class _Sequence:
    """Attributes:
    tokens: one per position that has a slot.
    written: positions whose keys and values are in the cache.
    digests: one per full block of the first `written` tokens; each covers all tokens up to the block's end.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    written: int = 0
    digests: list[bytes] = field(default_factory=list)


class BlockManager:
    """Allocates KV blocks and counts references to them. It moves no data: `append` returns the copies to make.

    Args:
        blocks: of the cache. block_size: positions per block.
        order: in which blocks are first allocated; by number, if None.

    Attributes:
        copies: blocks copied on write so far.
    """

    def __init__(self, blocks: int, block_size: int, order: Sequence[int] | None = None) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"{blocks} blocks of {block_size} positions")
        self.block_count, self.block_size = blocks, block_size
        self.copies = 0
        self._references = [0] * blocks
        # In the order in which they are allocated: the one freed first comes first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks) if order is None else order)
        # The prefix cache: full, written blocks by the digest of all tokens up to their end.
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._sequences: dict[int, _Sequence] = {}

    # --- state -------------------------------------------------------------------------------------------------------

    @property
    def free_count(self) -> int:
        """Blocks without references."""
        return len(self._free)

    @property
    def used_count(self) -> int:
        """Blocks with references; a shared one counts once."""
        return self.block_count - len(self._free)

    def sequences(self) -> list[int]:
        """All open sequences."""
        return list(self._sequences)

    def length(self, sequence: int) -> int:
        """Positions that have a slot."""
        return len(self._sequences[sequence].tokens)

    def written(self, sequence: int) -> int:
        """Positions whose keys and values are in the cache."""
        return self._sequences[sequence].written

    def blocks(self, sequence: int) -> Sequence[int]:
        """The sequence's blocks in the order of positions: the list itself, for reading."""
        return self._sequences[sequence].blocks

    def references(self, block: int) -> int:
        """Sequences that share a block."""
        return self._references[block]

    def slots(self, sequence: int, start: int, stop: int) -> NDArray[np.int64]:
        """Slots of positions start .. stop - 1."""
        first = start // self.block_size
        blocks = np.array(self._sequences[sequence].blocks[first : self.blocks_for(stop)], np.int64)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
        slots: NDArray[np.int64] = blocks[index - first] * self.block_size + offset
        return slots

    def blocks_for(self, tokens: int) -> int:
        """Blocks of a sequence of this many tokens."""
        return -(-tokens // self.block_size)

    # --- sequences ---------------------------------------------------------------------------------------------------

    def open(self, sequence: int, prompt: Sequence[int]) -> int:
        """Begin a sequence; returns the length of the prompt's prefix that is in the cache (prefix hit).

        The prefix is whole blocks, and never the whole prompt: the last token must be computed, for its logits. Its
        tokens count as appended and written.
        """
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence} is open")
        opened = _Sequence()
        for digest, block in self._shared(prompt):
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
            opened.blocks.append(block)
            opened.digests.append(digest)
        opened.written = len(opened.blocks) * self.block_size
        opened.tokens = list(prompt[: opened.written])
        self._sequences[sequence] = opened
        return opened.written

    def missing_blocks(self, prompt: Sequence[int]) -> int:
        """Free blocks that a sequence with this prompt would allocate."""
        in_use = sum(self._references[block] > 0 for _, block in self._shared(prompt))
        return self.blocks_for(len(prompt)) - in_use

    def _shared(self, prompt: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """The blocks of the prefix cache that hold a prefix of the prompt, each with its digest."""
        digest = b""
        for start in range(0, (len(prompt) - 1) // self.block_size * self.block_size, self.block_size):
            digest = _digest(digest, prompt[start : start + self.block_size])
            block = self._block_of.get(digest)
            if block is None:
                return
            yield digest, block

    def append(self, sequence: int, tokens: Sequence[int]) -> list[BlockCopy]:
        """Allocate slots for the next tokens, in blocks of this sequence alone; returns the copies to make first.

        Raises:
            OutOfBlocksError: there are too few free blocks; nothing has changed.
        """
        state = self._sequences[sequence]
        end = len(state.tokens) + len(tokens)
        fresh = self.blocks_for(end) - len(state.blocks)
        partial = len(state.tokens) % self.block_size != 0  # the last block has free slots
        copied = bool(partial and tokens and self._references[state.blocks[-1]] > 1)
        if fresh + copied > len(self._free):
            raise OutOfBlocksError(
                f"{fresh + copied} more blocks of {self.block_size} positions are needed, but {len(self._free)} of "
                f"{self.block_count} are free; give the cache more blocks, or admit fewer sequences."
            )
        copies = []
        if copied:
            source, target = state.blocks[-1], self._allocate()
            self._references[source] -= 1
            state.blocks[-1] = target
            copies.append(BlockCopy(source, target))
            self.copies += 1
        state.blocks += [self._allocate() for _ in range(fresh)]
        state.tokens += tokens
        return copies

    def commit(self, sequence: int, written: int) -> None:
        """The first `written` positions are in the cache; full blocks of them join the prefix cache."""
        state = self._sequences[sequence]
        if not state.written <= written <= len(state.tokens):
            raise ValueError(f"sequence {sequence} has {state.written} of {len(state.tokens)} positions, not {written}")
        state.written = written
        for i in range(len(state.digests), written // self.block_size):
            before = state.digests[-1] if state.digests else b""
            digest = _digest(before, state.tokens[i * self.block_size : (i + 1) * self.block_size])
            state.digests.append(digest)
            if digest not in self._block_of:  # else another block with the same tokens stays in the prefix cache
                self._forget(state.blocks[i])
                self._block_of[digest] = state.blocks[i]
                self._digest_of[state.blocks[i]] = digest

    def fork(self, parent: int, child: int) -> None:
        """Begin a sequence that continues from everything that another one has written, and shares its blocks."""
        if child in self._sequences:
            raise ValueError(f"sequence {child} is open")
        state = self._sequences[parent]
        written, blocks = state.written, state.blocks[: self.blocks_for(state.written)]
        for block in blocks:
            self._references[block] += 1
        digests = state.digests[: written // self.block_size]
        self._sequences[child] = _Sequence(state.tokens[:written], blocks, written, digests)

    def close(self, sequence: int) -> None:
        """End a sequence: its blocks without other references are free."""
        for block in self._sequences.pop(sequence).blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _allocate(self) -> int:
        """A free block, with one reference; it leaves the prefix cache."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def audit(self) -> None:
        """Check all counts.

        Raises:
            RuntimeError: a block is lost, both free and in use, or miscounted; or two sequences could write to it.
        """
        counts = [0] * self.block_count
        for sequence in self._sequences.values():
            if len(sequence.blocks) != self.blocks_for(len(sequence.tokens)):
                raise RuntimeError(f"{len(sequence.blocks)} blocks for {len(sequence.tokens)} tokens")
            if len(set(sequence.blocks)) != len(sequence.blocks):
                raise RuntimeError("a sequence has a block twice")
            for block in sequence.blocks:
                counts[block] += 1
            for block in sequence.blocks[sequence.written // self.block_size + 1 :]:
                if counts[block] > 1 or self._references[block] > 1:
                    raise RuntimeError(f"block {block} is shared before it is written")
        if counts != self._references:
            raise RuntimeError("references do not add up")
        if set(self._free) != {block for block, count in enumerate(counts) if not count}:
            raise RuntimeError("free blocks and unreferenced blocks differ")
        if {block: digest for digest, block in self._block_of.items()} != self._digest_of:
            raise RuntimeError("digests and blocks differ")


def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of all tokens up to a block's end: 16 bytes of BLAKE2b, so that equal digests mean equal tokens."""
    return hashlib.blake2b(before + np.array(tokens, "<i4").tobytes(), digest_size=16).digest()


class BlockTable:
    """The block table of the running sequences, as kernels read it: a row for each.

    Args:
        array: int32 [rows, width], memory of the runner.

    Attributes:
        dirty: per row, the range of entries (first, last + 1) that have changed since `clean`.
    """

    def __init__(self, array: NDArray[np.int32]) -> None:
        self.array = array
        self.dirty: dict[int, tuple[int, int]] = {}
        self._rows: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._unused = list(reversed(range(len(array))))

    def row(self, sequence: int) -> int:
        """The sequence's row; allocated at the first call."""
        if sequence not in self._rows:
            self._rows[sequence] = self._unused.pop()
            self._lengths[sequence] = 0
        return self._rows[sequence]

    def update(self, sequence: int, blocks: Sequence[int]) -> None:
        """Write a sequence's blocks to its row. Only entries that differ are written: in most steps none."""
        row, start = self.row(sequence), self._lengths[sequence]
        if start and self.array[row, start - 1] != blocks[start - 1]:  # replaced by copy-on-write
            start -= 1
        if start < len(blocks):
            self.array[row, start : len(blocks)] = blocks[start:]
            first, last = self.dirty.get(row, (start, len(blocks)))
            self.dirty[row] = min(first, start), max(last, len(blocks))
            self._lengths[sequence] = len(blocks)

    def release(self, sequence: int) -> None:
        """Free the row of a sequence that has ended or was preempted."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            del self._lengths[sequence]
            self._unused.append(row)

    def clean(self) -> None:
        """The device has all entries."""
        self.dirty.clear()


def paged_cache_buffer(layers: int, slots: int, kv_dim: int, dtype: str) -> Buffer:
    """The KV cache as a buffer of the memory plan: [layer][k | v][slot][kv_dim]."""
    return Buffer("kv cache", "paged_kv", (layers, 2, slots, kv_dim), dtype)
