"""The interface of a device: it runs a step's tokens through the model, and returns the next tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.bounds import check_indices, check_range
from numba_atomflow.memory.paged import BLOCK_SIZES
from numba_atomflow.model.features import beyond_llama
from numba_atomflow.sandbox.scheduler import Batch
from numba_atomflow.utils.progress import Progress

Layout = Literal["paged", "static"]  # static: each sequence has a contiguous part of the cache, and no block table


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of a runner's KV cache.

    Attributes:
        slots: positions of all sequences together, a multiple of every block size.
        block_sizes: that `use_block_size` accepts; the first one is in use at first.
        sequences: rows of the block table.
        longest: the most positions of one sequence.
    """

    slots: int
    block_sizes: tuple[int, ...]
    sequences: int
    longest: int

    @property
    def table_width(self) -> int:
        """Entries of a row of the block table."""
        return -(-self.longest // min(self.block_sizes))

    @property
    def capacity(self) -> int:
        """Slots of one sequence in the static layout."""
        return self.slots // self.sequences


def cache_sizes(
    geometry: ModelGeometry, blocks: int, block_sizes: Sequence[int], sequences: int, longest: int | None = None
) -> CacheSizes:
    """Sizes of a KV cache of `blocks` blocks of the first block size.

    Raises:
        OptionError: a number is out of range.
    """
    for size in block_sizes:
        if size not in BLOCK_SIZES:
            raise OptionError(f"block_size is {size}; kernels are made for {', '.join(map(str, BLOCK_SIZES))}.")
    for name, value in (("blocks", blocks), ("max_sequences", sequences)):
        if value < 1:
            raise OptionError(f"{name} is {value}; it must be 1 or more.")
    slots = -(-blocks * block_sizes[0] // max(block_sizes)) * max(block_sizes)
    return CacheSizes(slots, tuple(block_sizes), sequences, min(longest or slots, slots, geometry.max_positions))


def check_family(geometry: ModelGeometry) -> None:
    """Raises:
    OptionError: the model has what the sandbox's kernels lack.
    """
    missing = beyond_llama(geometry)
    if missing:
        raise OptionError(f"The sandbox has no kernels for {missing[0]}, which this model has; choose a Llama.")


def check_batch(
    batch: Batch,
    sizes: CacheSizes,
    block_size: int,
    block_table: NDArray[np.int32],
    vocabulary: int,
    max_batched_tokens: int,
) -> None:
    """Check that everything that a step's kernels index with is within the cache, the tables and the weights.

    Raises:
        IndexError: an index is not.
    """
    count, blocks = batch.token_count, sizes.slots // block_size
    check_range("tokens of a step", 0, count, max_batched_tokens)
    if not len(batch.positions) == len(batch.table_rows) == len(batch.slots) == count:
        raise IndexError(f"positions, rows of the block table and slots are not those of {count} tokens")
    check_indices("tokens", batch.tokens, vocabulary)
    check_indices("positions", batch.positions, sizes.longest)
    check_indices("slots", batch.slots, sizes.slots)
    check_indices("rows of the block table", batch.table_rows, len(block_table))
    last = batch.positions // block_size  # last entry of its row that a token reads
    width = int(last.max(initial=0)) + 1
    check_range("entries of the block table", 0, width, sizes.table_width)
    read = np.arange(width) <= last[:, None]
    check_indices("blocks", block_table[batch.table_rows, :width][read], blocks)
    for copy in batch.copies:
        check_indices("blocks to copy", np.array([copy.source, copy.target]), blocks)


def check_chunk(batch: Batch) -> None:
    """Check that a step's tokens are neighbours in one sequence.

    Raises:
        IndexError: they are not.
    """
    if (np.diff(batch.positions) != 1).any() or (batch.table_rows != batch.table_rows[0]).any():
        raise IndexError(f"{batch.token_count} tokens of a chunk are not neighbours in one sequence")


class StepRunner(Protocol):
    """What `ServingEngine` needs.

    Attributes:
        max_batched_tokens: the most tokens of a step of any sequences.
        prefill_chunk: the most tokens of a step that is a part of one prompt; 0: prompts are parts of other steps.
        block_table: int32 [sequences, table_width]; `block_table_changed` must follow every change.
        block_size: positions per KV block, one of `sizes.block_sizes`.
    """

    max_batched_tokens: int
    prefill_chunk: int
    sizes: CacheSizes
    block_table: NDArray[np.int32]
    block_size: int

    def block_table_changed(self, dirty: Mapping[int, tuple[int, int]]) -> None:
        """These entries (row: first, last + 1) of the block table have changed, for the next step to read."""

    def run(self, batch: Batch) -> list[int]:
        """Run a step: the most likely next token at each of `batch.logits_indices`.

        Raises:
            CheckpointError: the logits contain NaN or Inf.
        """


class Runner(StepRunner, Protocol):
    """A model on a device, with a paged KV cache.

    Attributes:
        device: name and version, as reports give them.
    """

    device: str

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile every kernel or load it from the compile cache; upload the weights."""

    def use_block_size(self, block_size: int) -> None:
        """Choose another block size. What the KV cache holds is invalid afterwards."""

    def close(self) -> None:
        """Free all memory."""

    # --- for the comparison ------------------------------------------------------------------------------------------

    def time_attention(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of one layer's attention in this step."""

    def time_step(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of the whole step, the arg-max of `batch.logits_indices` included."""
