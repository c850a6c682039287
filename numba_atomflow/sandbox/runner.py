"""What the server asks of a device: take a step's columns through the model, and say the next tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import OptionError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.bounds import check_indices, check_range
from numba_atomflow.memory.paged import BLOCK_SIZES
from numba_atomflow.sandbox.scheduler import Batch
from numba_atomflow.utils.progress import Progress

Layout = Literal["paged", "static"]  # static: each sequence has a contiguous part of the cache, and no page table


@dataclass(frozen=True)
class CacheSizes:
    """Of a runner's cache.

    Attributes:
        slots: positions of all sequences together, a multiple of every block size.
        block_sizes: that may be chosen; the first one is, to begin with.
        sequences: rows of the page table.
        longest: positions of one sequence at most.
    """

    slots: int
    block_sizes: tuple[int, ...]
    sequences: int
    longest: int

    @property
    def table_width(self) -> int:
        """Entries of a row of the page table."""
        return -(-self.longest // min(self.block_sizes))

    @property
    def capacity(self) -> int:
        """Slots of one sequence in the static layout."""
        return self.slots // self.sequences


def cache_sizes(
    geometry: ModelGeometry, blocks: int, block_sizes: Sequence[int], sequences: int, longest: int | None = None
) -> CacheSizes:
    """Sizes of a cache of `blocks` blocks of the first block size.

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
    OptionError: the model has a bias or norms of q and k, for which the sandbox has no kernels.
    """
    if geometry.qkv_bias or geometry.qk_norm:
        raise OptionError("The sandbox runs models of the Llama and Mistral families; choose one of them.")


def check_batch(
    batch: Batch, sizes: CacheSizes, block_size: int, pages: NDArray[np.int32], vocabulary: int, most_columns: int
) -> None:
    """Whether all that a step's kernels compute addresses with leads into the cache, the tables and the weights.

    Raises:
        IndexError: it does not.
    """
    columns, blocks = batch.columns, sizes.slots // block_size
    check_range("columns", 0, columns, most_columns)
    if not len(batch.positions) == len(batch.rows) == len(batch.slots) == columns:
        raise IndexError(f"positions, rows and slots of other than {columns} columns")
    check_indices("tokens", batch.tokens, vocabulary)
    check_indices("positions", batch.positions, sizes.longest)
    check_indices("slots", batch.slots, sizes.slots)
    check_indices("rows of the page table", batch.rows, len(pages))
    last = batch.positions // block_size  # entry of the page table that a column still reads
    width = int(last.max(initial=0)) + 1
    check_range("entries of the page table", 0, width, sizes.table_width)
    read = np.arange(width) <= last[:, None]
    check_indices("blocks", pages[batch.rows, :width][read], blocks)
    for copy in batch.copies:
        check_indices("blocks to copy", np.array([copy.source, copy.target]), blocks)


class StepRunner(Protocol):
    """What `ServerEngine` needs.

    Attributes:
        most_columns: of a step.
        pages: int32 [sequences, table_width], the page table; what changes there is announced by `pages_changed`.
        block_size: positions per block, one of `sizes.block_sizes`.
    """

    most_columns: int
    sizes: CacheSizes
    pages: NDArray[np.int32]
    block_size: int

    def pages_changed(self, dirty: Mapping[int, tuple[int, int]]) -> None:
        """These entries (row: first, last + 1) of the page table have changed; the next step must see it."""

    def run(self, batch: Batch) -> list[int]:
        """Take a step through the model: the most likely token behind each wanted column.

        Raises:
            CheckpointError: the logits contain NaN or Inf.
        """


class Runner(StepRunner, Protocol):
    """A model on a device, with a paged cache."""

    device: str

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile every kernel, or load it from the cache; bring weights to the device."""

    def use_block_size(self, block_size: int) -> None:
        """Choose another block size. What the cache holds means nothing afterwards."""

    def close(self) -> None:
        """Give all memory back."""

    # --- what the comparison asks ------------------------------------------------------------------------------------

    def time_attention(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of one layer's attention for this step's columns."""

    def time_step(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of the whole step, the choice of a token for each wanted column included."""
