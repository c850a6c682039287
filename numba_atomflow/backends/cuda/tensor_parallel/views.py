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

_ON_EVERY_RANK = ("logits", "position", "tokens", "x_norm", "final_x_norm")
_DIVIDED = (KV_CACHE, "q", "attn_out", "intermediate")  # each rank has its part of every row, and no more
_BY_ROWS = "residual"  # every rank has room for all of it, and its own part is valid


class ModelViews:
    """A model's views and ops, as if one GPU had all of it.

    Attributes:
        buffers: by name.
    """

    def __init__(self, kernels: RankKernels, max_seq_len: int) -> None:
        self._geometry, ranks = kernels.geometry, kernels.sharding.ranks
        plan = plan_memory(step_buffers(self._geometry, step_sizes(kernels, max_seq_len)))
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
    """Reads and writes views of the whole model: what every rank has, and what they have in parts."""

    def __init__(self, views: ModelViews, ranks: Sequence[Rank]) -> None:
        self._views, self._ranks = views, ranks

    def read(self, view: View) -> NDArray[Any]:
        """The view's contents (a copy); waits for the steps before.

        Raises:
            NotImplementedError: it is of another buffer, or does not begin where a row does.
        """
        if view.name in _ON_EVERY_RANK:
            return self._read(self._ranks[0], view)
        parts = [self._read(rank, view) for rank in self._ranks]
        if view.name == _BY_ROWS:
            parts = [self._part(rank, whole) for rank, whole in zip(self._ranks, parts, strict=True)]
        return np.concatenate(parts, axis=-1)

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values`, of the view's shape, into the view.

        Raises:
            NotImplementedError: as `read`.
        """
        values = np.broadcast_to(values, view.shape)
        for rank in self._ranks:
            own = self._part(rank, values) if view.name in _DIVIDED else values
            with rank.owner.current():
                rank.memory.write(self._on_rank(rank, view), own)

    def _read(self, rank: Rank, view: View) -> NDArray[Any]:
        with rank.owner.current():
            return rank.memory.read(self._on_rank(rank, view))

    def _part(self, rank: Rank, rows: NDArray[Any]) -> NDArray[Any]:
        """A rank's part of every row."""
        width = rows.shape[-1] // len(self._ranks)
        return rows[..., rank.number * width : (rank.number + 1) * width]

    def _on_rank(self, rank: Rank, view: View) -> View:
        """A rank's part of a view, or its copy of one that every rank has."""
        whole, own = self._views.buffers.get(view.name), rank.buffers.get(view.name)
        if whole is None or own is None or view.name not in (*_ON_EVERY_RANK, *_DIVIDED, _BY_ROWS):
            raise NotImplementedError(f"several GPUs cannot read or write {view.name}")
        itemsize = np.dtype(whole.dtype).itemsize
        row, rest = divmod(view.address - whole.address, whole.shape[-1] * itemsize)
        if rest or (view.pitch or view.shape[-1]) != whole.shape[-1]:
            raise NotImplementedError(f"several GPUs cannot read or write a part of the rows of {view.name}")
        width = view.shape[-1] // len(self._ranks) if view.name in _DIVIDED else view.shape[-1]
        address = own.address + row * own.shape[-1] * itemsize
        pitch = own.shape[-1] if width != own.shape[-1] else 0
        return View(view.name, address, (*view.shape[:-1], width), view.dtype, pitch=pitch)
