"""The memory plan: size and offset of every buffer of an engine, computed before the allocation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Pool = Literal["weights", "kv cache", "activations", "workspace"]
POOLS: tuple[Pool, ...] = ("weights", "kv cache", "activations", "workspace")  # in arena order
ALIGNMENT = 128  # bytes: two cache lines of a CPU, one memory transaction of a GPU


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor of the plan: pool, name, shape and dtype."""

    pool: Pool
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Buffers in arena order, with the offset of each from the arena's start."""

    buffers: tuple[Buffer, ...]
    offsets: tuple[int, ...]
    total: int

    def pool_bytes(self) -> dict[Pool, int]:
        """Bytes of each pool, without padding."""
        return {pool: sum(b.nbytes for b in self.buffers if b.pool == pool) for pool in POOLS}


def plan_memory(buffers: Iterable[Buffer]) -> MemoryPlan:
    """Assign offsets to buffers, pool by pool, aligned to `ALIGNMENT`."""
    ordered = sorted(buffers, key=lambda buffer: POOLS.index(buffer.pool))  # stable: keeps the order within a pool
    names = [buffer.name for buffer in ordered]
    if len(set(names)) != len(names):
        raise ValueError(f"two buffers of a plan share a name: {min(n for n in names if names.count(n) > 1)}")
    offsets, end = [], 0
    for buffer in ordered:
        offsets.append(end)
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return MemoryPlan(tuple(ordered), tuple(offsets), end)
