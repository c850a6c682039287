"""The views of a whole model, of which each rank has a part: what the engine reads and counts.

Their addresses are offsets in a plan of one GPU, of which nothing is allocated; `ModelMemory` finds a view's parts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels
from numba_atomflow.backends.cuda.tensor_parallel.plan import step_sizes
from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.plan import plan_memory
from numba_atomflow.memory.view import View
from numba_atomflow.model.buffers import step_buffers
from numba_atomflow.model.step import Head, Op, Weight, Weights, build_step

_ON_EVERY_RANK = ("logits", "position", "tokens")


class ModelViews:
    """A model's views and ops, as if one GPU had all of it.

    Attributes:
        buffers: by name.
    """

    def __init__(self, kernels: RankKernels, max_seq_len: int) -> None:
        self._geometry, ranks = kernels.geometry, kernels.sharding.ranks
        plan = plan_memory(step_buffers(self._geometry, step_sizes(max_seq_len)))
        self.buffers = {
            buffer.name: View(buffer.name, offset, buffer.shape, buffer.dtype)
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
        }
        projections, norms = dict[str, Weight](), dict[str, View]()
        for buffer in kernels.weight_buffers:
            if buffer.dtype == "float32":
                norms[buffer.name] = View(buffer.name, 0, buffer.shape, buffer.dtype)
            else:
                words = View(buffer.name, 0, (buffer.shape[0] * ranks,), buffer.dtype)
                layout = kernels.layout_of(buffer.name)
                projections[buffer.name] = Weight(layout.out_features * ranks, layout.in_features, words)
        self._weights = Weights(projections, norms)

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step."""
        return build_step(self._geometry, self._weights, self.buffers, tokens, head)


class ModelMemory:
    """Reads and writes rows of the KV cache, which ranks have by heads, and what every rank has."""

    def __init__(self, views: ModelViews, ranks: Sequence[Rank]) -> None:
        self._views, self._ranks = views, ranks

    def read(self, view: View) -> NDArray[Any]:
        """The view's contents (a copy); waits for the steps before.

        Raises:
            NotImplementedError: it is of another buffer, or not of whole rows.
        """
        if view.name in _ON_EVERY_RANK:
            with self._ranks[0].owner.current():
                return self._ranks[0].memory.read(self._on_rank(self._ranks[0], view))
        parts = []
        for rank in self._ranks:
            with rank.owner.current():
                parts.append(rank.memory.read(self._on_rank(rank, view)))
        return np.concatenate(parts, axis=-1)

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values`, of the view's shape, into the view.

        Raises:
            NotImplementedError: as `read`.
        """
        values = np.broadcast_to(values, view.shape)
        for rank in self._ranks:
            part = self._on_rank(rank, view)
            own = values
            if view.name == KV_CACHE:
                own = values[..., rank.number * part.shape[-1] : (rank.number + 1) * part.shape[-1]]
            with rank.owner.current():
                rank.memory.write(part, own)

    def _on_rank(self, rank: Rank, view: View) -> View:
        """A rank's part of a view, or its copy of one that every rank has."""
        whole, own = self._views.buffers.get(view.name), rank.buffers.get(view.name)
        divisible = view.name in (KV_CACHE, *_ON_EVERY_RANK)
        if whole is None or own is None or view.pitch or view.shape[-1] != whole.shape[-1] or not divisible:
            raise NotImplementedError(f"several GPUs cannot read or write {view.name}{list(view.shape)}")
        row_bytes = whole.shape[-1] * np.dtype(whole.dtype).itemsize
        first_row = (view.address - whole.address) // row_bytes
        address = own.address + first_row * own.shape[-1] * np.dtype(own.dtype).itemsize
        return View(view.name, address, (*view.shape[:-1], own.shape[-1]), view.dtype)
