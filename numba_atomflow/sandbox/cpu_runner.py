"""The sandbox's model on the CPU: the engine's kernels over a paged KV cache. Everything but weights is float32."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.errors import CheckpointError, non_finite_logits
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.host.machine import cpu_name
from numba_atomflow.host.threads import choose_threads, describe_threads, kernel_turn, use_threads
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.bounds import check_indices
from numba_atomflow.memory.paged import BlockCopy, paged_cache_buffer
from numba_atomflow.memory.plan import Buffer, plan_memory
from numba_atomflow.model.rope_tables import rope_tables
from numba_atomflow.ops import attention, embedding, projection, rms_norm, rope
from numba_atomflow.ops.arguments import bind
from numba_atomflow.ops.formats import KV_FLOAT32
from numba_atomflow.ops.paged_attention import attend_paged
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import CacheSizes, Layout, check_batch, check_family
from numba_atomflow.sandbox.scheduler import Batch, Chunk
from numba_atomflow.utils.progress import Progress

MAX_BATCHED_TOKENS = 64

Weight = tuple[NDArray[Any], NDArray[np.float32] | None]  # codes and scales, as kernels take them


class CpuRunner:
    """Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name, which must stay mapped.
        sizes: of the cache.
        threads: of the kernels; by default one per core, or what a CPU quota allows.
        check_weights: called after every step; raises if the arrays have changed.

    Raises:
        OptionError: more threads than cores, or no kernels for this family of models.
    """

    max_batched_tokens = MAX_BATCHED_TOKENS
    prefill_chunk = 0

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        sizes: CacheSizes,
        threads: int | None = None,
        *,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        check_family(geometry)
        self._check_weights = check_weights
        self.threads = choose_threads(threads)
        self.device = f"{cpu_name()}, {describe_threads(self.threads, threads)}"
        self.geometry, self.sizes, self._weights = geometry, sizes, weights
        self.block_size = sizes.block_sizes[0]
        g = geometry
        scratch = projection.chunk_scratch()
        widths = {
            "residual": g.hidden,
            "x_norm": g.hidden,
            "qkv": g.q_dim + 2 * g.kv_dim,
            "q": g.q_dim,
            "attn_out": g.q_dim,
            "intermediate": g.ffn,
            "logits": g.vocabulary,
        }
        self._arena = HostArena(
            plan_memory(
                [
                    paged_cache_buffer(g.layers, sizes.slots, g.kv_dim, KV_FLOAT32.dtype),
                    *(Buffer("activations", name, (MAX_BATCHED_TOKENS, n), "float32") for name, n in widths.items()),
                    Buffer("workspace", "scores", (self.threads, sizes.longest), "float32"),
                    Buffer("workspace", "scratch", (self.threads, scratch), "float32"),
                    Buffer("workspace", "block_table", (sizes.sequences, sizes.table_width), "int32"),
                    Buffer("workspace", "cosines", (sizes.longest, g.head_dim // 2), "float32"),
                    Buffer("workspace", "sines", (sizes.longest, g.head_dim // 2), "float32"),
                ]
            )
        )
        self._cache = self._array("paged_kv")
        self.block_table = self._array("block_table")
        self.block_table[:] = 0
        self._tables = self._array("cosines"), self._array("sines")
        for name, table in rope_tables(g, sizes.longest):
            self._array(name.removeprefix("rope."))[:] = table
        self._call: Callable[..., None] = _call_checked

    def _array(self, name: str) -> NDArray[Any]:
        return self._arena[name].host_array()

    def prepare(self, progress: Progress | None = None) -> None:
        """Run a small step of each kind, so that numba compiles all kernels. Only here the shapes of all arguments are
        checked: later steps differ in the number of tokens alone.
        """
        for done, tokens in enumerate((1, 2, projection.GEMV_TOKENS + 1)):
            if progress:
                progress("compiling kernels", done, 3)
            self.run(_dry_step(tokens))
        if progress:
            progress("compiling kernels", 3, 3)
        self._call = _call

    def use_block_size(self, block_size: int) -> None:
        """Choose another block size."""
        self.block_size = block_size

    def block_table_changed(self, dirty: Mapping[int, tuple[int, int]]) -> None:
        """Nothing to do: kernels read `block_table` itself."""
        del dirty

    def close(self) -> None:
        """Nothing to do: the memory is freed with this object."""

    # --- a step ------------------------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> list[int]:
        """Run a step; returns the most likely next token at each of `batch.logits_indices`."""
        return self._run(batch, self._attend_paged)

    def _check(self, batch: Batch) -> None:
        check_batch(batch, self.sizes, self.block_size, self.block_table, self.geometry.vocabulary, MAX_BATCHED_TOKENS)

    def _run(self, batch: Batch, attend: Callable[[Batch, int], None]) -> list[int]:
        try:
            tokens = self._step(batch, attend)
        except CheckpointError:  # changed weights look like damaged ones
            self._check_weights()
            raise
        self._check_weights()
        return tokens

    def _step(self, batch: Batch, attend: Callable[[Batch, int], None]) -> list[int]:
        g, weights, count = self.geometry, self._weights, batch.token_count
        residual, x_norm, qkv = (self._array(name)[:count] for name in ("residual", "x_norm", "qkv"))
        q, attn_out, intermediate = (self._array(name)[:count] for name in ("q", "attn_out", "intermediate"))
        call = self._call
        self._check(batch)
        self._copy(batch.copies)
        use_threads(self.threads)
        with kernel_turn():
            call(embedding.embed, batch.tokens, *self._weight("embedding"), residual)
            for i in range(g.layers):
                call(rms_norm.rms_norm, residual, weights[f"layer.{i}.attention_norm"], g.norm_eps, x_norm)
                self._project(f"layer.{i}.qkv", x_norm, qkv)
                indices = batch.positions, batch.slots
                call(rope.rope_and_store_paged, qkv, *indices, *self._tables, q, *self._cache[i])
                attend(batch, i)
                self._project(f"layer.{i}.o", attn_out, residual, accumulate=True)
                call(rms_norm.rms_norm, residual, weights[f"layer.{i}.ffn_norm"], g.norm_eps, x_norm)
                self._gate_up(f"layer.{i}.gate_up", x_norm, intermediate)
                self._project(f"layer.{i}.down", intermediate, residual, accumulate=True)
        return self._choose(residual[batch.logits_indices]) if batch.logits_indices else []

    def _choose(self, residual: NDArray[np.float32]) -> list[int]:
        rows = len(residual)
        x_norm, logits = self._array("x_norm")[:rows], self._array("logits")[:rows]
        with kernel_turn():
            self._call(rms_norm.rms_norm, residual, self._weights["final_norm"], self.geometry.norm_eps, x_norm)
            self._project("embedding" if self.geometry.tied_embeddings else "vocabulary", x_norm, logits)
        if not np.isfinite(logits.max()):
            raise non_finite_logits()
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return tokens

    def _attend_paged(self, batch: Batch, layer: int) -> None:
        q, attn_out = self._array("q")[: batch.token_count], self._array("attn_out")[: batch.token_count]
        indices = self.block_table, batch.table_rows, batch.positions, self.block_size
        cache, head_dim = self._cache[layer], self.geometry.head_dim
        self._call(attend_paged, q, *cache, *indices, head_dim, self._array("scores"), attn_out)

    def _attend_static(self, batch: Batch, layer: int) -> None:
        """The engine's attention of one token, for each token of the step."""
        check_indices("positions in a sequence's part of the cache", batch.positions, self.sizes.capacity)
        q, attn_out, scores = self._array("q"), self._array("attn_out"), self._array("scores")[:, None]
        for t, row in enumerate(batch.table_rows.tolist()):
            first = row * self.sizes.capacity
            keys, values = self._cache[layer, :, first : first + self.sizes.capacity]
            position = batch.positions[t : t + 1]
            head_dim = self.geometry.head_dim
            token = slice(t, t + 1)
            whole = head_dim, attention.NO_WINDOW, attention.NO_CAP
            self._call(attention.attend_tokens, q[token], keys, values, position, *whole, scores, attn_out[token])

    def _copy(self, copies: list[BlockCopy]) -> None:
        size = self.block_size
        for copy in copies:
            source = self._cache[:, :, copy.source * size : (copy.source + 1) * size]
            self._cache[:, :, copy.target * size : (copy.target + 1) * size] = source

    def _weight(self, part: str) -> Weight:
        codes = self._weights[f"{part}.weight"]
        if f"{part}.scale" in self._weights:
            return codes.view(np.int8), self._weights[f"{part}.scale"]
        return codes.view(np.int16), None

    def _project(self, part: str, x: NDArray[Any], y: NDArray[Any], *, accumulate: bool = False) -> None:
        codes, scales = self._weight(part)
        if len(x) <= projection.GEMV_TOKENS:
            kernel = projection.project_token if len(x) == 1 else projection.project_tokens
            self._call(kernel, codes, scales, x, y, accumulate)
        else:
            self._call(projection.project_chunk, codes, scales, x, y, accumulate, self._array("scratch"))

    def _gate_up(self, part: str, x: NDArray[Any], y: NDArray[Any]) -> None:
        codes, scales = self._weight(part)
        if len(x) <= projection.GEMV_TOKENS:
            kernel = projection.project_token_swiglu if len(x) == 1 else projection.project_tokens_swiglu
            self._call(kernel, codes, scales, x, y)
        else:
            self._call(projection.project_chunk_swiglu, codes, scales, x, y, self._array("scratch"))

    # --- times -------------------------------------------------------------------------------------------------------

    def time_attention(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of one layer's attention. Layers alternate, as in a step, so that their KV is not cached."""
        attend = self._attend_paged if layout == "paged" else self._attend_static
        use_threads(self.threads)
        self._check(batch)
        layers = self.geometry.layers
        return _median_seconds(lambda i: attend(batch, i % layers), repeats, warm=layers)

    def time_step(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of the whole step."""
        attend = self._attend_paged if layout == "paged" else self._attend_static
        return _median_seconds(lambda _: self._run(batch, attend), repeats, warm=1)


def _call(kernel: Any, *arguments: Any) -> None:
    kernel(*arguments)


def _call_checked(kernel: Any, *arguments: Any) -> None:
    """Raises:
    IndexError: the shapes of the arguments do not fit together.
    """
    bind(kernel, *arguments)()


def _median_seconds(action: Callable[[int], object], repeats: int, warm: int) -> float:
    """Median of `repeats` runs, after `warm` that are discarded: the first access to a page of memory is slow."""
    seconds = []
    for i in range(warm + repeats):
        started = time.perf_counter()
        action(i)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[warm:]))


def _dry_step(tokens: int) -> Batch:
    """A step for compilation only: every token is at position 0 of row 0."""
    zeros = np.zeros(tokens, np.int64)
    chunk = Chunk(Request(0, [0] * tokens, 1), 0, tokens, [])
    positions = np.zeros(tokens, np.int64)
    return Batch([chunk], np.zeros(tokens, np.int32), positions, zeros, zeros, zeros, list(range(tokens)), [])
