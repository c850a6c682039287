"""The CUDA backend: its lifecycle, and what the engine calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Decode, LaunchVerification, Observer, Prefill
from numba_atomflow.backends.cuda.decode_path import kernels_for, verification_of
from numba_atomflow.backends.cuda.edits import DeviceEdits
from numba_atomflow.backends.cuda.families import beyond_fast_paths, beyond_gemm, sliding_window
from numba_atomflow.backends.cuda.graphs import StepGraphs
from numba_atomflow.backends.cuda.logprob_ring import LogprobRing
from numba_atomflow.backends.cuda.measure import CudaMeasurements
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.backends.cuda.prefill_path import choose_prefill_path, most_chunk_tokens
from numba_atomflow.backends.cuda.queue import GraphSteps, StepQueue, TokenRing
from numba_atomflow.backends.cuda.verify import WideSteps
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.memory.bounds import check_range, check_tokens
from numba_atomflow.memory.device import DeviceMemory
from numba_atomflow.model.formats import HeadFormat, head_part
from numba_atomflow.model.step import NO_LOGITS, Head, Op
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec
from numba_atomflow.sampling import Sampler, SamplingParams, accepted_tokens, most_likely_token
from numba_atomflow.utils.progress import OpenBar, Progress


class CudaBackend:
    """Runs a checkpoint's ops on an NVIDIA GPU.

    Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name; not needed any more when `prepare` has returned.
        max_seq_len: positions of the KV cache.
        device_ordinal: which GPU, counted from 0 as the driver shows them.
        dependent: programmatic dependent launch; where the GPU has it, if None.
        graphs: replay captured steps; without, kernels are launched one by one (to measure what that costs).
        decode: how decode steps run; `decode_path` has what was chosen.
        prefill: how prompts run; `prefill_path` has what was chosen.
        prefill_chunk: most tokens of a prefill step on the GEMM path; 2,048 if None.

    Attributes:
        measure: times ops and steps. device_edits: edits by device functions. Both are there after `prepare`.

    Raises:
        BackendError: no usable GPU, too little memory on it, or `decode` or `prefill` is not possible.
    """

    name = "cuda"
    measure: CudaMeasurements
    device_edits: DeviceEdits

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        *,
        device_ordinal: int = 0,
        dependent: bool | None = None,
        graphs: bool = True,
        decode: Decode = "auto",
        prefill: Prefill = "auto",
        prefill_chunk: int | None = None,
    ) -> None:
        self.geometry = geometry
        self._arrays: Mapping[str, NDArray[Any]] | None = weights
        self._max_seq_len = max_seq_len
        self._capture = graphs
        self.compile_seconds = 0.0
        self._wide_steps: WideSteps | None = None
        self._in_wide_step = False  # the last step was a prompt's of several tokens in the persistent kernel
        self._owner = DeviceResources()  # of everything on the GPU; it must not refer to the backend
        try:
            self._gpu = self._owner.open(device_ordinal)
            head: HeadFormat = "fp8" if f"{head_part(geometry)}.scale" in weights else "fp16"
            chip = chip_of(self._gpu)
            window = sliding_window(geometry, max_seq_len)
            self.prefill_path = choose_prefill_path(
                prefill,
                chip,
                max_seq_len,
                beyond_gemm=beyond_gemm(geometry),
                beyond_fp8=beyond_fast_paths(geometry, window),
            )
            self.kernels, self.decode_path = kernels_for(
                geometry,
                chip,
                head,
                decode,
                dependent=dependent,
                chunk=most_chunk_tokens(self.prefill_path, prefill_chunk, max_seq_len),
                fp8_activations=self.prefill_path.name == "fp8",
                window=window,
            )
            self.prefill_chunk = min(self.kernels.prefill_chunk, max_seq_len)
            self.verification = verification_of(self.kernels)
            self.plan = cuda_plan(self.kernels, max_seq_len)
            self.device = f"{self._gpu.name}, CUDA {'.'.join(map(str, self._gpu.driver_version))}"
            with self._owner.current():
                self._allocate()
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self._owner.close()
            raise

    def _allocate(self) -> None:
        resources = self._owner.resources
        self.stream = resources.stream()
        self._model = DeviceModel(self.kernels, self.plan, self.stream, resources)
        self._ring = TokenRing(resources)
        self._logprob_ring = LogprobRing(resources)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile what every reply needs or load it from the cache, upload the weights, and capture graphs.

        Other kernels and graphs, on the GEMM path all those of prompts, follow on first use.
        """
        if self._arrays is None:
            raise RuntimeError("prepare was called before")
        owner, model = self._owner, self._model
        with owner.current():
            self._loaded = loaded = LoadedKernels(self.kernels.planned, self._gpu.capability, owner.resources)
            loaded.require(self._kernels_at_start(), progress)
            self.compile_seconds = loaded.seconds
            model.upload(loaded, self._arrays, self._max_seq_len, progress)
            rings = self._ring.view, self._logprob_ring.view
            self._graphs = StepGraphs(model, loaded, *rings, owner.resources, capture=self._capture)
            self._graphs.prepare(self.prefill_chunk)
            self._queue = StepQueue(GraphSteps(model, self._graphs, owner), self._ring, self._max_seq_len)
            if self._graphs.persistent is not None:
                self._wide_steps = WideSteps(model, self._graphs.persistent, loaded, self._queue, owner.resources)
            self.measure = CudaMeasurements(model, self._graphs, self._queue, self._gpu, owner)
            self.device_edits = DeviceEdits(
                model, self._graphs, loaded, owner, self._gpu.capability, capture=self._capture
            )
            self.start(Sampler(SamplingParams(), self.geometry.vocabulary, ()))
        self._arrays = None

    def _kernels_at_start(self) -> list[KernelSpec]:
        """What is compiled, and loaded, before the first prompt: on the GEMM path, nothing that its length decides."""
        kernels = self.kernels.start
        if self.kernels.prefill is None:
            kernels = kernels + self.kernels.layer_kernels(self.kernels.width_for(self.prefill_chunk))
        return [kernel.spec for kernel in kernels]

    def close(self) -> None:
        """Free all memory on the GPU. Closing twice is fine; every later use raises `ClosedError`."""
        self._arrays = None
        self._owner.close()

    @property
    def observed_chunk(self) -> int:
        """As many as a prefill step takes."""
        return self.prefill_chunk

    @property
    def prompt_lengths(self) -> list[int]:
        """One for each width of the GEMV kernels and each bucket of the GEMM path."""
        return self.kernels.prompt_lengths(self.prefill_chunk)

    def show_compiling(self, open_bar: OpenBar) -> None:
        """Open a bar whenever kernels are compiled from now on."""
        self._loaded.open_bar = open_bar

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step over `tokens` tokens."""
        return self._model.step(tokens, head)

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written. Steps that were queued ahead are discarded."""
        self._queue.seek(position)

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""
        self._sampler = sampler
        with self._owner.current():
            self._model.set_sampler(sampler)
        self._graphs.greedy = sampler.params.greedy
        self._graphs.logprobs = sampler.params.logprobs is not None
        self._top_logprobs = sampler.params.logprobs or 0

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it. Does not wait."""
        with self._owner.current():
            columns = self.kernels.prompt_columns(len(tokens))
            self._send(tokens, columns or 0)
            self._in_wide_step = columns is not None
            self._queue.run(len(tokens), head)

    def decode(self) -> None:
        """Run the tokens that were sampled last, sample the next ones, and advance. Does not wait: some more steps are
        queued ahead, so that the GPU never waits for the host.
        """
        self._in_wide_step = False
        self._queue.decode()

    def sampled_tokens(self) -> tuple[int, ...]:
        """The tokens that the last step has sampled, in order; waits for them."""
        tokens = self._queue.receive()
        if self._in_wide_step:
            self._queue.check_wide_step()
        return tokens

    def sampled_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """How likely the tokens of `sampled_tokens` were, which must have returned them."""
        return (self._logprob_ring.read(self._queue.requested, self._top_logprobs),)

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy).

        An observer sees the LM head run by itself, reading the residual stream that the last observed step, or the
        observer, has left.

        Raises:
            BackendError: the watchdog of the persistent kernel tripped.
        """
        if self._in_wide_step and observer is None:
            self._queue.check_wide_step()
            with self._owner.current():
                return self._model.memory.read(self._model.wide_logits(start, stop))
        logits = []
        with self._owner.current():
            for first, last in self._head_rows(start, stop):
                op = self._model.head(first, last)
                self._run_observed(op, self._graphs.bind(op), observer)
                logits.append(self._model.memory.read(op.logits))
        return np.concatenate(logits)

    @contextmanager
    def memory(self) -> Iterator[DeviceMemory]:
        """Access to views, by synchronous copies in stream order: after the steps that are queued."""
        with self._owner.current():
            yield self._model.memory

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens at the current position, which stays as it is.

        The array is valid until the next `verify`.
        """
        check_range("tokens of a step that verifies", 0, len(tokens), self.verification.width)
        self._in_wide_step = False
        if self._wide_steps is not None:
            self._check(tokens)
            with self._owner.current():
                return self._wide_steps.run(tokens, self._queue.position)
        position = self._queue.position
        self.prefill(tokens, NO_LOGITS)
        logits = self.logits(0, 1)
        self.seek(position)
        return logits

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """Those of the tokens after the first that are the most likely ones, and the most likely token after them. The
        persistent kernel chooses them.
        """
        if self._wide_steps is None:
            logits = self.verify(tokens)
            return accepted_tokens(tokens, lambda row: most_likely_token(logits[row]))
        return self._launch_verification(tokens, sampled=False)()

    @property
    def launch_verification(self) -> LaunchVerification | None:
        """Where steps of several tokens run: their kernel chooses the most likely tokens, or the kernels of decode
        steps sample from each row of their logits.
        """
        return None if self._wide_steps is None else self._launch_verification

    def _launch_verification(self, tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        assert self._wide_steps is not None  # noqa: S101
        check_range("tokens of a step that verifies", 0, len(tokens), self.verification.width)
        self._check(tokens)
        self._in_wide_step = False
        with self._owner.current():
            wait = self._wide_steps.launch(tokens, self._queue.position, self._sampler if sampled else None)

        def wait_in_context() -> list[int]:
            with self._owner.current():
                return wait()

        return wait_in_context

    def time_widths(self, repeats: int) -> dict[int, float]:
        """Median seconds of the kernel of a step that verifies, at the current position, by its number of tokens;
        nothing where no step takes several.
        """
        with self._owner.current():
            return {} if self._wide_steps is None else self._wide_steps.seconds(repeats, self._queue.position)

    def trace_widths(self, repeats: int) -> dict[int, StepTrace]:
        """When each CTA of these kernels did what, at the current position, by the number of tokens."""
        with self._owner.current():
            return {} if self._wide_steps is None else self._wide_steps.traces(repeats, self._queue.position)

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` with an observer: the launches that the graph was captured from, one op at a time."""
        count = len(tokens)
        self._in_wide_step = False
        with self._owner.current():
            self._send(tokens)
            with self._queue.launching(count, head):
                for index, op in enumerate(self.step(count, head)):
                    self._run_observed(op, self._graphs.op_launches(op, index, count, head), observer)

    def _send(self, tokens: Sequence[int], columns: int = 0) -> None:
        """Copy a step's tokens to the device, after checking that its kernels stay inside the cache and the embedding.

        Args:
            columns: the number that they are padded to, as those of `verify` are; 0: the kernels pad them.

        Raises:
            IndexError: they would not.
        """
        self._check(tokens)
        padded = [*tokens, *repeat(tokens[-1], columns - len(tokens))] if columns else tokens
        buffers, staged = self._model.buffers, self._model.staged
        staged.write(buffers["tokens"], padded)
        if "count" in buffers:
            staged.write(buffers["count"], [len(padded)])

    def _check(self, tokens: Sequence[int]) -> None:
        check_range("positions", self._queue.position, len(tokens), self._max_seq_len)
        check_tokens(tokens, self.geometry.vocabulary)

    def _head_rows(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows of logits, cut into what one pass over the LM head computes.

        A pass over several rows reads the padding as well. From the first row on, the buffer has room for it, whatever
        the number of rows; from elsewhere, each row takes a pass.
        """
        width = self.kernels.head_rows if start == 0 else 1
        return [(first, min(first + width, stop)) for first in range(start, stop, width)]

    def _run_observed(self, op: Op, launches: Sequence[Launch], observer: Observer | None) -> None:
        if observer:
            observer.before(op, self._model.memory)
        for launch in launches:
            launch.run()
        if observer:
            observer.after(op, self._model.memory)
