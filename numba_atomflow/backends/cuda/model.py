"""A model's tensors on the GPU: one arena with weights, KV cache and activations."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.choose import LARGEST_CHUNK
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.plan import AttentionScratch, SamplingState
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.device import DeviceArena, DeviceMemory, StagedWrites
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View
from numba_atomflow.model.rope_tables import rope_tables, tables_of
from numba_atomflow.model.step import Head, LmHead, Op, Weight, Weights, build_head, build_step, build_tail
from numba_atomflow.ops.cuda.runtime.launch import Kernel
from numba_atomflow.ops.cuda.runtime.upload import Uploader, upload
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.sampling import LEAST_TEMPERATURE, Sampler
from numba_atomflow.utils.progress import Progress

if TYPE_CHECKING:
    from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels

STAGED_BYTES = 8 * LARGEST_CHUNK  # of prompts and options of sampling, that may wait for their copy to the device


class DeviceModel:
    """The static buffers of a model's steps: their addresses never change.

    Args:
        resources: owns the arena.

    Attributes:
        memory: reads and writes views. staged: writes without waiting.
        buffers: all views but the weights, by name. weight_views: those of the weights.
        sampling, attention: views of the workspace that kernels take beside an op's own.

    Raises:
        BackendError: the GPU has too little free memory.
    """

    def __init__(self, kernels: ModelKernels, plan: MemoryPlan, stream: Any, resources: Resources) -> None:
        self.kernels, self.geometry = kernels, kernels.geometry
        self.stream = stream
        self._arena = DeviceArena(plan, resources)
        self.memory, self.staged = DeviceMemory(stream), StagedWrites(STAGED_BYTES, stream, resources)
        self.buffers = {b.name: self._arena[b.name] for b in plan.buffers if b.pool != "weights"}
        self.weight_views = {b.name: self._arena[b.name] for b in plan.buffers if b.pool == "weights"}
        self.weights = self._weights()
        self.sampling = SamplingState.of(self.buffers)
        self._sampler_writer = SamplerWriter(self.staged, self.sampling)
        self.attention = AttentionScratch.of(self.buffers)
        self._tiled_inputs, self._tiled_head = dict[str, View](), dict[str, View]()
        if kernels.prefill is not None:
            self._tiled_inputs = self._tiled(kernels.prefill)
            self._tiled_head = {"final_x_norm": self._tiled_inputs.pop("final_x_norm")}

    def _weights(self) -> Weights:
        projections, vectors = {}, {}
        for name, view in self.weight_views.items():
            if view.dtype == "float32":
                vectors[name] = view
            else:
                layout = self.kernels.layout_of(name)
                projections[name] = Weight(layout.out_features, layout.in_features, view)
        norms = {name: view for name, view in vectors.items() if name.endswith("_norm")}
        return Weights(projections, norms, {name: view for name, view in vectors.items() if name not in norms})

    def _tiled(self, prefill: "PrefillKernels") -> dict[str, View]:
        """The inputs of projections on the GEMM path, by the names of those in row order."""
        views = {}
        for name, tiles in prefill.tiles.items():
            buffer, shape = self.buffers[f"tiles.{name}"], (tiles.tokens, tiles.in_features)
            views[name] = View(buffer.name, buffer.address, shape, tiles.dtype, tiling=tiles)
        return views

    # --- ops ---------------------------------------------------------------------------------------------------------

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step over `tokens` tokens."""
        buffers = self.buffers | self._tiled_inputs if self.kernels.on_gemm_path(tokens) else self.buffers
        return build_step(self.geometry, self.weights, buffers, tokens, head)

    def tail(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step that are launched after its layers: without the LM head where the persistent kernel has
        computed all logits.
        """
        if self.kernels.prompt_columns(tokens) is None:
            return build_tail(self.geometry, self.weights, self.buffers, tokens, head)
        rows = head.rows(tokens)
        buffers = self.buffers | {"logits": self.wide_logits(rows.start, rows.stop)}
        ops = build_tail(self.geometry, self.weights, buffers, tokens, head)
        return [op for op in ops if not isinstance(op, LmHead)]

    def wide_logits(self, start: int, stop: int) -> View:
        """Logits [stop - start, V] of these rows of the last step of several tokens in the persistent kernel."""
        return self.buffers["verify.logits"].rows(start, stop)

    def head(self, start: int, stop: int) -> LmHead:
        """The LM head of rows start .. stop - 1 of the last step."""
        buffers = self.buffers | self._tiled_head if self.kernels.on_gemm_path(stop - start) else self.buffers
        return build_head(self.geometry, self.weights, buffers, start, stop)

    # --- contents ----------------------------------------------------------------------------------------------------

    def upload(
        self,
        loaded: Mapping[str, Kernel],
        arrays: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        progress: Progress | None,
    ) -> None:
        """Upload and prepack the weights, and initialise everything else.

        Args:
            loaded: kernels by name. arrays: of the checkpoint, by name.
            max_seq_len: positions of the KV cache, on which some kinds of RoPE depend.
        """
        uploader = Uploader(loaded, self._arena.space_after("weights"), self.stream)
        upload(uploader, arrays, self.weight_views, self.kernels.layout_of, progress)
        # Padding of activations must be zero, and counters start at zero; staging has overwritten both.
        self._arena.clear(("activations", "workspace"), self.stream)
        positions = self.buffers[f"{tables_of(self.geometry)[0]}.cosines"].shape[0]
        for name, table in rope_tables(self.geometry, positions, max_seq_len):
            self.memory.write(self.buffers[name], table)
        self.reset_argmax()

    def set_sampler(self, sampler: Sampler) -> None:
        """Options, seed and context of the tokens to sample from here on. Does not wait."""
        self._sampler_writer.write(sampler)

    def set_position(self, position: int) -> None:
        """The position at which the next token is written. Does not wait."""
        self.staged.write(self.buffers["position"], [position])

    def reset_argmax(self) -> None:
        """Clear the running arg-max of the logits."""
        self.memory.write(self.sampling.best, np.array([LOWEST_KEY]))

    def posted_tokens(self) -> int:
        """How many tokens the device has sampled and posted to the host so far."""
        return int(self.memory.read(self.sampling.tokens_posted)[0])


class SamplerWriter:
    """Writes options, seed and context of the tokens to sample, as the kernels read them; what would make no difference
    it leaves out: options that are there already, the seed if nothing is drawn, and without a penalty the context.
    """

    def __init__(self, staged: StagedWrites, sampling: SamplingState) -> None:
        self._staged, self._sampling = staged, sampling
        self._options: list[float] = []  # on the device

    def write(self, sampler: Sampler) -> None:
        """Of this sampler. Does not wait."""
        params, sampling = sampler.params, self._sampling
        temperature = max(params.temperature, LEAST_TEMPERATURE) if params.temperature else 0.0
        options = [temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty]
        if options != self._options:
            self._staged.write(sampling.options, options)
            self._options = options
        if not params.greedy:
            self._staged.write(sampling.generator, np.array([sampler.seed, 0], np.uint64))
        if params.repetition_penalty != 1.0:
            seen, bitmap = np.packbits(sampler.seen, bitorder="little"), np.zeros(sampling.seen.shape, np.uint32)
            bitmap.view(np.uint8)[: len(seen)] = seen
            self._staged.write(sampling.seen, bitmap)
