"""The sandbox's model on an NVIDIA GPU: a CUDA graph per GEMV width, whose inputs lie in device memory.

A step's batch (positions, slots, rows of the block table, tokens) is one copy from pinned memory, changed entries of
the block table are another. The host waits for the step's tokens, as the next step is planned from them.

A chunk of one prompt (`gpu_chunk.py`) has a graph for each bucket, captured when it is first needed.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.errors import non_finite_logits
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.device import DeviceArena, DeviceMemory, PinnedArray, copy_to_device
from numba_atomflow.memory.paged import BlockCopy
from numba_atomflow.memory.view import View
from numba_atomflow.model.rope_tables import rope_tables
from numba_atomflow.ops.cuda.attention.decode import AttentionArguments
from numba_atomflow.ops.cuda.attention.paged import PagedAttentionArguments
from numba_atomflow.ops.cuda.gemv.kernels import (
    AddArguments,
    PagedQkvArguments,
    QkvArguments,
    StoreArguments,
    SwigluArguments,
)
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.graph import Graph, time_graph, time_launches
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.runtime.upload import Uploader, upload
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.embedding import EmbedArguments
from numba_atomflow.ops.cuda.token.order import token_of
from numba_atomflow.ops.formats import FP8_E4M3, FP16
from numba_atomflow.sandbox.gpu_chunk import ChunkLaunches
from numba_atomflow.sandbox.gpu_kernels import CHUNK_INPUTS, STEP_INPUTS, SandboxKernels
from numba_atomflow.sandbox.runner import CacheSizes, Layout, check_batch, check_chunk, check_family
from numba_atomflow.sandbox.scheduler import Batch
from numba_atomflow.utils.progress import Progress

_GREEDY = (0.0, 0.0, 1.0, 0.0, 1.0)  # temperature, top-k, top-p, min-p, repetition penalty
_NOISE = 1 << 24  # random float16 elements, repeated to fill the cache


class GpuRunner:
    """Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name; unused after `prepare`.
        sizes: of the cache.
        same_width: as in `SandboxKernels`: batch-invariant results.

    Raises:
        BackendError: no usable GPU, or too little memory on it.
        OptionError: no kernels for this family of models.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        sizes: CacheSizes,
        *,
        same_width: bool = False,
    ) -> None:
        check_family(geometry)
        self.geometry, self.sizes, self._weights = geometry, sizes, weights
        self._projections = [n.removesuffix(".weight") for n in weights if n.endswith(".weight")]
        vectors = [n for n in weights if not n.endswith((".weight", ".scale"))]
        self._head = "embedding" if geometry.tied_embeddings else "vocabulary"
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        self._owner = DeviceResources()  # of all resources on the GPU; must not refer to the runner
        try:
            self._gpu = self._owner.open()
            head = FP8_E4M3 if f"{self._head}.scale" in weights else FP16
            chip = chip_of(self._gpu)
            self.kernels = SandboxKernels(geometry, chip, sizes, head=head, same_width=same_width)
            self.max_batched_tokens, self.prefill_chunk = self.kernels.widths[-1], self.kernels.prefill_chunk
            self.device = f"{self._gpu.name}, CUDA {'.'.join(map(str, self._gpu.driver_version))}"
            self.plan = self.kernels.plan({name: len(weights[name]) for name in vectors}, self._projections)
            with self._owner.current():
                self._allocate()
        except BaseException:
            with suppress(Exception):  # report the first error
                self._owner.close()
            raise

    def _allocate(self) -> None:
        resources = self._owner.resources
        self._stream = resources.stream()
        self._arena = DeviceArena(self.plan, resources)
        self._memory = DeviceMemory(self._stream)
        self._step = PinnedArray((len(STEP_INPUTS), self.max_batched_tokens), "int64", resources)
        self._best = PinnedArray((self.max_batched_tokens,), "int64", resources)
        self._pinned_table = PinnedArray(self._arena["block_table"].shape, "int32", resources)
        self.block_table: NDArray[np.int32] = self._pinned_table.array[: self.sizes.sequences]
        self._chunk_inputs = PinnedArray((len(CHUNK_INPUTS),), "int64", resources)
        self._chunk_tokens = PinnedArray((max(self.prefill_chunk, 1),), "int32", resources)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free all resources on the GPU. May be called twice."""
        self._owner.close()

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile the kernels or load them from the compile cache, upload the weights, capture the steps' graphs. All
        but those of chunks, which follow on first use.
        """
        planned = self.kernels.planned
        with self._owner.current():
            self._loaded = LoadedKernels(planned, self._gpu.capability, self._owner.resources)
            self._loaded.require((kernel.spec for kernel in planned.values()), progress)
            self._upload(progress)
            self.use_block_size(self.sizes.block_sizes[0])
            for width in self.kernels.widths:
                for with_logits in (False, True):
                    self._graph(width, "paged", with_logits)
        self._weights = {}

    def _upload(self, progress: Progress | None) -> None:
        targets = {b.name: self._arena[b.name] for b in self.plan.buffers if b.pool == "weights"}
        staging = self._arena.space_after("weights")
        upload(Uploader(self._loaded, staging, self._stream), self._weights, targets, self.kernels.layout_of, progress)
        # Padding of activations must be zero, and counters start at zero.
        self._arena.clear(("activations", "workspace"), self._stream)
        for name, table in rope_tables(self.geometry, self.sizes.longest):
            self._memory.write(self._arena[name.removeprefix("rope.")], table)
        self._memory.write(self._arena["options"], np.array(_GREEDY))
        self._fill_cache()

    def _fill_cache(self) -> None:
        """Fill the KV cache with finite noise: the comparison reads positions that no step has written."""
        cache = self._arena["paged_kv"]
        noise = np.random.default_rng(0).standard_normal(min(_NOISE, cache.nbytes // 2), np.float32).astype(np.float16)
        copy_to_device(cache.address, noise, self._stream)
        for start in range(noise.nbytes, cache.nbytes, noise.nbytes):
            count = min(noise.nbytes, cache.nbytes - start)
            call("cuMemcpyDtoDAsync", cache.address + start, cache.address, count, self._stream)
        call("cuStreamSynchronize", self._stream)

    # --- StepRunner --------------------------------------------------------------------------------------------------

    def use_block_size(self, block_size: int) -> None:
        """Choose another block size. Padding tokens read the first slot after those of sequences."""
        self.block_size = block_size
        row = self.sizes.sequences
        self._pinned_table.array[row, 0] = self.sizes.slots // block_size
        self.block_table_changed({row: (0, 1)})

    def block_table_changed(self, dirty: Mapping[int, tuple[int, int]]) -> None:
        """Copy these entries to the device, in stream order. No step is running: pinned memory may be written."""
        if not dirty:
            return
        with self._owner.current():
            for row, (first, last) in dirty.items():
                entries = self._pinned_table.array[row, first:last]
                copy_to_device(self._arena["block_table"].index(row).rows(first, last).address, entries, self._stream)

    def run(self, batch: Batch) -> list[int]:
        """Run a step; returns the most likely next token at each of `batch.logits_indices`."""
        is_chunk = batch.token_count > self.max_batched_tokens
        most = self.prefill_chunk if is_chunk else self.max_batched_tokens
        check_batch(batch, self.sizes, self.block_size, self.block_table, self.geometry.vocabulary, most)
        with self._owner.current():
            self._copy(batch.copies)
            if is_chunk:
                self._run_chunk(batch)
            else:
                width = self._upload_batch(batch, self.sizes.slots)
                self._graph(width, "paged", bool(batch.logits_indices)).replay()
            best = self._best.view
            call(
                "cuMemcpyDtoHAsync",
                self._best.array.ctypes.data,
                self._arena["best"].address,
                best.nbytes,
                self._stream,
            )
            call("cuStreamSynchronize", self._stream)
        rows = range(len(batch.logits_indices)) if is_chunk else batch.logits_indices
        tokens = [token_of(int(self._best.array[i])) for i in rows]
        if None in tokens:
            raise non_finite_logits()
        return [token for token in tokens if token is not None]

    def _run_chunk(self, batch: Batch) -> None:
        """Start a step of many tokens of one sequence. Logits are the last token's, in row 0."""
        check_chunk(batch)
        count = batch.token_count
        self._upload_chunk(batch)
        self._chunk_graph(bucket_for(count)).replay()
        if batch.logits_indices:
            for launch in self._head_launches(1, count - 1):
                launch.run()

    def _upload_chunk(self, batch: Batch) -> None:
        """Copy a chunk to the device."""
        inputs, tokens = self._chunk_inputs.array, self._chunk_tokens.array[: batch.token_count]
        inputs[:] = batch.positions[0], batch.token_count, batch.table_rows[0]
        tokens[:] = batch.tokens
        copy_to_device(self._arena["chunk.inputs"].address, inputs, self._stream)
        copy_to_device(self._arena["chunk.tokens"].address, tokens, self._stream)
        self._clear_best()

    def _upload_batch(self, batch: Batch, padding_slot: int) -> int:
        """Copy a batch to the device; returns the GEMV width. Padding tokens write to `padding_slot`."""
        width, count = self.kernels.width_for(batch.token_count), batch.token_count
        step = self._step.array
        for i, values in enumerate((batch.positions, batch.cached, batch.table_rows, batch.slots)):
            step[i, :count] = values
        for i, padding in enumerate((0, 0, self.sizes.sequences, padding_slot)):
            step[i, count:] = padding
        tokens = step[-1].view(np.int32)
        tokens[:count], tokens[count:] = batch.tokens, 0
        copy_to_device(self._arena["step"].address, step, self._stream)
        self._clear_best()
        return width

    def _clear_best(self) -> None:
        """Set all bits, the initial value of the arg-max."""
        best = self._arena["best"]
        call("cuMemsetD8Async", best.address, 0xFF, best.nbytes, self._stream)

    def _copy(self, copies: list[BlockCopy]) -> None:
        """Copy-on-write: one strided copy per KV block, the same slots of keys and values in every layer."""
        if not copies:
            return
        from cuda.bindings import driver

        layers, parts, slots, _ = self._arena["paged_kv"].shape
        pitch = self._arena["paged_kv"].index(0, 0).nbytes
        block = pitch // slots * self.block_size
        for copy in copies:
            parameters = driver.CUDA_MEMCPY2D()
            parameters.srcMemoryType = parameters.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
            parameters.srcDevice = self._arena["paged_kv"].address + copy.source * block
            parameters.dstDevice = self._arena["paged_kv"].address + copy.target * block
            parameters.srcPitch = parameters.dstPitch = pitch
            parameters.WidthInBytes, parameters.Height = block, layers * parts
            call("cuMemcpy2DAsync", parameters, self._stream)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _graph(self, width: int, layout: Layout, with_logits: bool) -> Graph:
        """The step of this width, with or without LM head and arg-max."""
        key = width, layout, self.block_size if layout == "paged" else 0, with_logits
        if key not in self._graphs:
            self._graphs[key] = Graph(
                self._step_launches(width, layout, with_logits), self._stream, self._owner.resources
            )
        return self._graphs[key]

    def _chunk_graph(self, bucket: int) -> Graph:
        """The embedding and the layers of a chunk."""
        key = "chunk", self.block_size, bucket
        if key not in self._graphs:
            self._graphs[key] = Graph(self._chunk_launches(bucket), self._stream, self._owner.resources)
        return self._graphs[key]

    def _chunk_launches(self, bucket: int) -> list[Launch]:
        chunk = ChunkLaunches(self.geometry, self.kernels, self._arena.__getitem__, self._launch_planned)
        self._require(chunk.kernels(bucket, self.block_size))
        return chunk.step(bucket, self.block_size)

    def _step_launches(self, width: int, layout: Layout, with_logits: bool) -> list[Launch]:
        view = self._arena.__getitem__
        residual, intermediate = view("residual"), view("intermediate")
        embed = EmbedArguments(weights=view("embedding"), tokens=self._input("tokens"), residual=residual)
        launches = [self._launch(f"embed_x{width}", embed)]
        for i in range(self.geometry.layers):
            layer = f"layer.{i}"
            gate_up = self._norm_arguments(f"{layer}.gate_up", f"{layer}.ffn_norm")
            o = AddArguments(weights=view(f"{layer}.o"), x=view("attn_out"), residual=residual)
            down = AddArguments(weights=view(f"{layer}.down"), x=intermediate, residual=residual)
            launches += [
                self._qkv(width, layout, i),
                self._attention(width, layout, i),
                self._launch(f"o_x{width}", o),
                self._launch(f"gate_up_x{width}", SwigluArguments(**gate_up, intermediate=intermediate)),
                self._launch(f"down_x{width}", down),
            ]
        return launches + (self._head_launches(width, 0) if with_logits else [])

    def _head_launches(self, width: int, first: int) -> list[Launch]:
        """LM head and arg-max of `width` tokens, from row `first` of the residual stream on."""
        view = self._arena.__getitem__
        inputs = self._norm_arguments(self._head, "final_norm")
        inputs["residual"] = inputs["residual"].rows(first, first + width)
        launches = [self._launch(f"lm_head_x{width}", StoreArguments(**inputs, y=view("logits")))]
        for i in range(width):
            logits, best = view("logits").index(i), view("best").rows(i, i + 1)
            arguments = ArgmaxArguments(logits=logits, seen=view("seen"), options=view("options"), best=best)
            launches.append(self._launch("argmax", arguments))
        return launches

    def _qkv(self, width: int, layout: Layout, layer: int) -> Launch:
        view = self._arena.__getitem__
        positions, (keys, values) = self._input("positions"), self._layer_cache(layer)
        arguments = self._norm_arguments(f"layer.{layer}.qkv", f"layer.{layer}.attention_norm")
        arguments |= {
            "cosines": view("cosines"),
            "sines": view("sines"),
            "q": view("q"),
            "keys": keys,
            "values": values,
        }
        if layout == "static" and width == 1:
            return self._launch("qkv_single_x1", QkvArguments(**arguments, position=positions))
        paged = PagedQkvArguments(**arguments, positions=positions, slots=self._input("slots"))
        return self._launch(f"qkv_x{width}", paged)

    def _norm_arguments(self, weights: str, norm_weight: str) -> dict[str, View]:
        """The arguments that projections with RMSNorm share."""
        view = self._arena.__getitem__
        return {
            "weights": view(weights),
            "residual": view("residual"),
            "norm_weight": view(norm_weight),
            "x_norm": view("x_norm"),
        }

    def _attention(self, width: int, layout: Layout, layer: int) -> Launch:
        view = self._arena.__getitem__
        keys, values = self._layer_cache(layer)
        common = {"q": view("q"), "keys": keys, "values": values, "out": view("attn_out")}
        common |= {"partials": view("partials"), "counters": view("counters")}
        if layout == "static" and width == 1:
            single = AttentionArguments(**common, position=self._input("positions"))
            return self._launch("attention_single_x1", single)
        paged = PagedAttentionArguments(
            **common,
            positions=self._input("positions"),
            cached=self._input("cached"),
            table_rows=self._input("table_rows"),
            block_table=view("block_table"),
        )
        form = f"paged{self.block_size}" if layout == "paged" else "static"
        return self._launch(f"attention_{form}_x{width}", paged)

    def _layer_cache(self, layer: int) -> tuple[View, View]:
        return self._arena["paged_kv"].index(layer, 0), self._arena["paged_kv"].index(layer, 1)

    def _input(self, name: str) -> View:
        return self._arena["step"].index(STEP_INPUTS.index(name))

    def _launch(self, name: str, arguments: tuple[DeviceArray | int, ...]) -> Launch:
        return self._launch_planned(self.kernels.planned[name], arguments)

    def _launch_planned(self, planned: Planned, arguments: tuple[DeviceArray | int, ...]) -> Launch:
        self._require([planned])
        return Launch(self._loaded[planned.spec.name], planned.ctas, arguments, self._stream)

    def _require(self, planned: Iterable[Planned]) -> None:
        """Load these kernels; those that must be compiled are compiled in parallel."""
        self._loaded.require(kernel.spec for kernel in planned)

    # --- times -------------------------------------------------------------------------------------------------------

    def time_attention(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of one layer's attention: that of all layers, each with its own cache, in one graph."""
        with self._owner.current():
            width = self._upload_batch(batch, self._padding_slot(layout))
            launches = [self._attention(width, layout, i) for i in range(self.geometry.layers)]
            return time_launches(launches, self._stream, repeats, self._owner.resources)

    def time_step(self, batch: Batch, layout: Layout, repeats: int) -> float:
        """Median seconds of the whole step's graph."""
        with self._owner.current():
            width = self._upload_batch(batch, self._padding_slot(layout))
            graph = self._graph(width, layout, bool(batch.logits_indices))
            return float(np.median(time_graph(graph, repeats, self._clear_best)))

    def _padding_slot(self, layout: Layout) -> int:
        """Where padding tokens write to: position 0 of the row after those of sequences."""
        return self.sizes.slots if layout == "paged" else self.sizes.sequences * self.sizes.capacity
