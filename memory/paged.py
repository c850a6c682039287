"""The paged KV cache: who owns which block, and where each sequence's positions lie.

The cache of a layer is an array of slots [blocks * block_size, kv_dim]; a block is `block_size` neighbouring slots, the
same ones in every layer. A sequence owns a list of blocks, its page table: position p lies in slot
``blocks[p // block_size] * block_size + p % block_size``. `BlockManager` counts references to blocks: sequences that
begin alike share full blocks, a fork shares all of them, and whoever must write into a shared block gets a copy first.

A block that nobody references keeps what it holds until it is taken for something else, so that a prompt may still
find its beginning there; the one that was given back first is taken first.
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

BLOCK_SIZES = (8, 16, 32, 64, 128)  # positions per block that kernels are made for


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """What one block holds is to be put into another, in every layer, before anything is written to the other."""

    source: int
    target: int


@dataclass
class _Sequence:
    """Attributes:
    tokens: one per position that has a slot.
    written: positions whose keys and values are in the cache.
    digests: one per full block of `tokens` in front of `written`; each covers all tokens up to its end.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    written: int = 0
    digests: list[bytes] = field(default_factory=list)


class BlockManager:
    """Hands out blocks, and counts who uses them. It moves no bytes: it says which block must be copied.

    Args:
        blocks: of the cache. block_size: positions per block.
        order: in which blocks are handed out at first; by number, if None.

    Attributes:
        copies: blocks copied before a write so far.
    """

    def __init__(self, blocks: int, block_size: int, order: Sequence[int] | None = None) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"{blocks} blocks of {block_size} positions")
        self.block_count, self.block_size = blocks, block_size
        self.copies = 0
        self._references = [0] * blocks
        # What was given back first is taken first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks) if order is None else order)
        self._block_of: dict[bytes, int] = {}  # full, written blocks by the digest of all tokens up to their end
        self._digest_of: dict[int, bytes] = {}
        self._sequences: dict[int, _Sequence] = {}

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def free_count(self) -> int:
        """Blocks that nobody references."""
        return len(self._free)

    @property
    def used_count(self) -> int:
        """Blocks that somebody references; a shared one counts once."""
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
        """The sequence's page table: the list itself, for reading."""
        return self._sequences[sequence].blocks

    def references(self, block: int) -> int:
        """Sequences that use a block."""
        return self._references[block]

    def slots(self, sequence: int, start: int, stop: int) -> NDArray[np.int64]:
        """Slots of positions start .. stop - 1."""
        first = start // self.block_size
        blocks = np.array(self._sequences[sequence].blocks[first : self.blocks_for(stop)], np.int64)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
        slots: NDArray[np.int64] = blocks[index - first] * self.block_size + offset
        return slots

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens has."""
        return -(-tokens // self.block_size)

    # --- the life of a sequence --------------------------------------------------------------------------------------

    def open(self, sequence: int, prompt: Sequence[int]) -> int:
        """Begin a sequence; the number of the prompt's tokens that are in the cache already.

        They are whole blocks, and never all tokens: the last one must be computed, for its logits. They count as
        appended and written.
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
        """Free blocks that opening a sequence and filling in its prompt would take."""
        in_use = sum(self._references[block] > 0 for _, block in self._shared(prompt))
        return self.blocks_for(len(prompt)) - in_use

    def _shared(self, prompt: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """The blocks that hold the prompt's beginning, each with its digest."""
        digest = b""
        for start in range(0, (len(prompt) - 1) // self.block_size * self.block_size, self.block_size):
            digest = _digest(digest, prompt[start : start + self.block_size])
            block = self._block_of.get(digest)
            if block is None:
                return
            yield digest, block

    def append(self, sequence: int, tokens: Sequence[int]) -> list[BlockCopy]:
        """Give the next tokens slots that this sequence alone may write to; the copies to make before.

        Raises:
            OutOfBlocksError: there are too few free blocks; nothing has changed.
        """
        grown = self._sequences[sequence]
        end = len(grown.tokens) + len(tokens)
        fresh = self.blocks_for(end) - len(grown.blocks)
        begun = len(grown.tokens) % self.block_size != 0  # the last block has room
        split = bool(begun and tokens and self._references[grown.blocks[-1]] > 1)
        if fresh + split > len(self._free):
            raise OutOfBlocksError(
                f"{fresh + split} more blocks of {self.block_size} positions are needed, but {len(self._free)} of "
                f"{self.block_count} are free; give the cache more blocks, or admit fewer sequences."
            )
        copies = []
        if split:
            shared, own = grown.blocks[-1], self._take()
            self._references[shared] -= 1
            grown.blocks[-1] = own
            copies.append(BlockCopy(shared, own))
            self.copies += 1
        grown.blocks += [self._take() for _ in range(fresh)]
        grown.tokens += tokens
        return copies

    def commit(self, sequence: int, written: int) -> None:
        """The first `written` positions are in the cache now; whole blocks of them may be shared from here on."""
        done = self._sequences[sequence]
        if not done.written <= written <= len(done.tokens):
            raise ValueError(f"sequence {sequence} has {done.written} of {len(done.tokens)} positions, not {written}")
        done.written = written
        for i in range(len(done.digests), written // self.block_size):
            before = done.digests[-1] if done.digests else b""
            digest = _digest(before, done.tokens[i * self.block_size : (i + 1) * self.block_size])
            done.digests.append(digest)
            if digest not in self._block_of:  # else another block holds the same, and goes on serving
                self._forget(done.blocks[i])
                self._block_of[digest] = done.blocks[i]
                self._digest_of[done.blocks[i]] = digest

    def fork(self, parent: int, child: int) -> None:
        """Begin a sequence that goes on from all that another one has written, and shares its blocks."""
        if child in self._sequences:
            raise ValueError(f"sequence {child} is open")
        old = self._sequences[parent]
        count = self.blocks_for(old.written)
        for block in old.blocks[:count]:
            self._references[block] += 1
        digests = old.digests[: old.written // self.block_size]
        self._sequences[child] = _Sequence(old.tokens[: old.written], old.blocks[:count], old.written, list(digests))

    def close(self, sequence: int) -> None:
        """End a sequence: blocks that nobody else references are free."""
        for block in self._sequences.pop(sequence).blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None

    # --- blocks ------------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        """A free block, with one reference; what it held is lost."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def audit(self) -> None:
        """Count everything anew.

        Raises:
            RuntimeError: a block is lost, free and in use, or counted wrongly; or two sequences could write to it.
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
    """Stands for all tokens up to a block's end. 16 bytes of BLAKE2b: equal digests are equal tokens."""
    return hashlib.blake2b(before + np.array(tokens, "<i4").tobytes(), digest_size=16).digest()


class BlockTable:
    """The page tables of the sequences that run, as kernels read them: a row each.

    Args:
        array: int32 [rows, width], which the GPU's runner also sends to the device.

    Attributes:
        dirty: per row, the range of entries that have changed since `clean`.
    """

    def __init__(self, array: NDArray[np.int32]) -> None:
        self.array = array
        self.dirty: dict[int, tuple[int, int]] = {}
        self._rows: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._unused = list(reversed(range(len(array))))

    def row(self, sequence: int) -> int:
        """The sequence's row; it gets one if it has none."""
        if sequence not in self._rows:
            self._rows[sequence] = self._unused.pop()
            self._lengths[sequence] = 0
        return self._rows[sequence]

    def update(self, sequence: int, blocks: Sequence[int]) -> None:
        """Put a sequence's blocks into its row. What has not changed is not written: mostly that is everything."""
        row, known = self.row(sequence), self._lengths[sequence]
        start = known
        if known and self.array[row, known - 1] != blocks[known - 1]:  # a copy has taken its place
            start = known - 1
        if start < len(blocks):
            self.array[row, start : len(blocks)] = blocks[start:]
            first, last = self.dirty.get(row, (start, len(blocks)))
            self.dirty[row] = min(first, start), max(last, len(blocks))
            self._lengths[sequence] = len(blocks)

    def release(self, sequence: int) -> None:
        """The sequence has ended, or waits: its row is free."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            del self._lengths[sequence]
            self._unused.append(row)

    def clean(self) -> None:
        """What was dirty has reached the device."""
        self.dirty.clear()


def paged_cache_buffer(layers: int, slots: int, kv_dim: int, dtype: str) -> Buffer:
    """The cache as a buffer of the memory plan: [layer][k | v][slot][kv_dim]."""
    return Buffer("kv cache", "paged_kv", (layers, 2, slots, kv_dim), dtype)
