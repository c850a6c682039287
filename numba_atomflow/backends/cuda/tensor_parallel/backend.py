"""The backend of several GPUs that share a model: what the engine calls."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Observer
from numba_atomflow.backends.cuda.families import check_no_window
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.backends.cuda.tensor_parallel.gpus import connect, open_all, ranks_per_gpu
from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels
from numba_atomflow.backends.cuda.tensor_parallel.measure import RankMeasurements
from numba_atomflow.backends.cuda.tensor_parallel.observe import ObservedSteps
from numba_atomflow.backends.cuda.tensor_parallel.plan import DECODE, prefill_path, rank_plan
from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank, upload
from numba_atomflow.backends.cuda.tensor_parallel.steps import RankSteps
from numba_atomflow.backends.cuda.tensor_parallel.verify import TIMED, VerifyingSteps
from numba_atomflow.backends.cuda.tensor_parallel.views import ModelMemory, ModelViews
from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.logprobs import TokenLogprobs
from numba_atomflow.memory.bounds import check_range, check_tokens
from numba_atomflow.model.formats import HeadFormat, head_part
from numba_atomflow.model.sharding import Sharding
from numba_atomflow.model.step import Head, Op
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.utils.progress import OpenBar, Progress


class TensorParallelBackend:
    """Runs a checkpoint's ops on several NVIDIA GPUs of one machine, with the bits of one.

    Prompts run in the same steps as replies, up to 8 tokens at a time.

    Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name; not needed any more when `prepare` has returned.
        max_seq_len: positions of the KV cache.
        ordinals: of the GPUs, one for each rank. Tests of one GPU name it several times: its SMs are then divided.

    Attributes:
        plan: what each of the GPUs allocates.

    Raises:
        OptionError: so many GPUs cannot share this model.
        BackendError: there are not so many GPUs, they are not alike or not connected, or have too little memory.
    """

    name = "cuda"
    decode_path = DECODE
    observed_chunk = 1
    device_edits = None  # edits are functions of the host

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        *,
        ordinals: Sequence[int],
    ) -> None:
        check_no_window(geometry, max_seq_len)
        sharding, shared = Sharding(geometry, len(ordinals)), ranks_per_gpu(ordinals)
        self.geometry, self._max_seq_len = geometry, max_seq_len
        self._arrays: Mapping[str, NDArray[Any]] | None = weights
        self.compile_seconds = 0.0
        self._top_logprobs = 0
        head: HeadFormat = "fp8" if f"{head_part(geometry)}.scale" in weights else "fp16"
        owners, devices = open_all(ordinals)
        try:
            connect(devices)
            kernels = RankKernels(sharding, chip_of(devices[0]), head, ranks_per_gpu=shared)
            self.prefill_path, self.verification = prefill_path(kernels), kernels.verification
            self.prefill_chunk = min(kernels.most_columns, max_seq_len)
            self.plan = rank_plan(kernels, max_seq_len)
            gpus = zip(devices, owners, strict=True)
            self._ranks = [Rank(number, kernels, self.plan, *gpu) for number, gpu in enumerate(gpus)]
        except BaseException:
            for owner in owners:
                owner.close()
            raise
        self.prompt_lengths = sorted({min(width, self.prefill_chunk) for width in (1, *kernels.wide_shapes)})
        self._rows = 0  # of the last prompt's step, if it had several tokens
        gpu = devices[0]
        self.device = f"{len(ordinals)} x {gpu.name}, CUDA {'.'.join(map(str, gpu.driver_version))}"
        self._views = ModelViews(kernels, max_seq_len)
        self._steps = RankSteps(self._ranks)
        self._queue = StepQueue(self._steps, self._ranks[0].ring, max_seq_len)
        self.measure = RankMeasurements(self._steps, self._queue, self._views, max_seq_len)
        self._observed = ObservedSteps(self._steps, self._queue, self._views)

    # --- lifecycle ---------------------------------------------------------------------------------------------------

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile what every reply needs or load it from the cache, and upload each rank's rows of the weights.

        Kernels of several tokens follow when a prompt, or a step that verifies, first needs them.
        """
        if self._arrays is None:
            raise RuntimeError("prepare was called before")
        for rank in self._ranks:
            with rank.owner.current():
                self.compile_seconds += rank.load_kernels(progress)
        upload(self._ranks, self._arrays, progress)
        for rank in self._ranks:
            with rank.owner.current():
                rank.initialise(self._max_seq_len)
                rank.bind([other for other in self._ranks if other is not rank])
        self._verifying = VerifyingSteps(self._steps, self._queue)
        self._steps.wait()
        self.start(Sampler(SamplingParams(), self.geometry.vocabulary, ()))
        self._arrays = None

    def close(self) -> None:
        """Free all memory on the GPUs. Closing twice is fine; every later use raises `ClosedError`."""
        self._arrays = None
        self._steps.close()

    def show_compiling(self, open_bar: OpenBar) -> None:
        """Open a bar whenever kernels are compiled from now on."""
        self._steps.open_bar = open_bar

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step of one token over the views of the whole model."""
        return self._views.step(tokens, head)

    def seek(self, position: int) -> None:
        """Set the position at which the next token is written. Steps that were queued ahead are discarded."""
        self._queue.seek(position)

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps: every rank samples by itself, of the same logits."""
        self._sampler = sampler
        for rank in self._ranks:
            with rank.owner.current():
                rank.set_sampler(sampler)
        self._steps.greedy = sampler.params.greedy
        self._steps.logprobs = sampler.params.logprobs is not None
        self._top_logprobs = sampler.params.logprobs or 0

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it. Does not wait, but for the first of
        a width, whose kernel it loads.
        """
        check_range("tokens of a prompt's step", 0, len(tokens), self.prefill_chunk)
        self._check(tokens)
        self._rows = len(tokens) if len(tokens) > 1 else 0
        self._steps.send(tokens)
        self._queue.run(len(tokens), head)

    def _check(self, tokens: Sequence[int]) -> None:
        check_range("positions", self._queue.position, len(tokens), self._max_seq_len)
        check_tokens(tokens, self.geometry.vocabulary)

    def decode(self) -> None:
        """Run the tokens that were sampled last, sample the next ones, and advance. Does not wait."""
        self._rows = 0
        self._queue.decode()

    def sampled_tokens(self) -> tuple[int, ...]:
        """The tokens that the last step has sampled, in order; waits for them."""
        tokens = self._queue.receive()
        if self._rows:
            self._queue.check_wide_step()
        return tokens

    def sampled_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """How likely the tokens of `sampled_tokens` were, which must have returned them."""
        return (self._ranks[0].logprob_ring.read(self._queue.requested, self._top_logprobs),)

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy); with an observer of one row."""
        check_range("rows of logits", start, stop - start, 1 if observer is not None else max(self._rows, 1))
        if observer is not None:
            return self._observed.logits(observer)[: stop - start]
        if self._rows:
            self._queue.check_wide_step()
            first = self._ranks[0]
            with first.owner.current():
                return first.memory.read(first.buffers["verify.logits"].rows(start, stop))
        try:
            self._steps.run_head()
        except BackendError:
            self._queue.distrust()
            raise
        with self.memory() as memory:
            logits: NDArray[np.float32] = memory.read(self._views.buffers["logits"])
        return logits[: stop - start]

    @contextmanager
    def memory(self) -> Iterator[ModelMemory]:
        """Access to views of the whole model, of which each rank has a part."""
        yield ModelMemory(self._views, self._ranks)

    def verify(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), V] after each of the tokens at the current position, which stays as it is.

        The array is valid until the next `verify`.
        """
        self._check_verified(tokens)
        return self._verifying.run(tokens, self._queue.position)

    def verify_greedy(self, tokens: Sequence[int]) -> list[int]:
        """The tokens after the first that are the most likely ones, and the most likely token after them."""
        return self.launch_verification(tokens, sampled=False)()

    def launch_verification(self, tokens: Sequence[int], *, sampled: bool) -> Callable[[], list[int]]:
        """Launch `verify` on all ranks; their kernels choose the most likely tokens, or the first rank samples."""
        self._check_verified(tokens)
        return self._verifying.launch(tokens, self._queue.position, self._sampler if sampled else None)

    def time_widths(self, repeats: int) -> dict[int, float]:
        """Median seconds of a step that verifies, at the current position, by its number of tokens."""
        check_range("positions", self._queue.position, TIMED, self._max_seq_len)
        return self._verifying.seconds(repeats, self._queue.position)

    def _check_verified(self, tokens: Sequence[int]) -> None:
        check_range("tokens of a step that verifies", 0, len(tokens), self.verification.width)
        self._check(tokens)
        self._rows = 0

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` of one token with an observer: the ops of the persistent kernel, one at a time on all
        ranks.
        """
        check_range("tokens of a step under an observer", 0, len(tokens), self.observed_chunk)
        self._check(tokens)
        self._rows = 0
        self._observed.run(tokens[0], head, observer)
