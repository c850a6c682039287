"""The CUDA backend as the engine sees it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Decode, Observer
from numba_atomflow.backends.cuda.bind import Binder
from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.backends.cuda.measure import measure_ceilings
from numba_atomflow.backends.cuda.persistent import PersistentStep, fault_sentence
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.backends.cuda.queue import TokenChannel
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.checkpoint.format import HeadFormat, head_part
from numba_atomflow.device.driver import call
from numba_atomflow.device.resources import DeviceResources, closed_sentence
from numba_atomflow.errors import CheckpointError
from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.memory.bounds import check_indices, check_range
from numba_atomflow.memory.device import DeviceArena, DeviceMemory
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Head, Op, Sample, Weight, Weights, build_head, build_step
from numba_atomflow.ops import rope
from numba_atomflow.ops.cuda.runtime.build import build
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.runtime.graph import Graph, time_graph, time_launches
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.runtime.upload import Uploader, upload
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.sampling import LEAST_TEMPERATURE, Sampler, SamplingParams
from numba_atomflow.utils.progress import Progress

AHEAD = 3  # replays that are queued before their tokens are asked for; the surplus at a reply's end is thrown away


class CudaBackend:
    """Runs a checkpoint's ops on an NVIDIA GPU.

    Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name; not needed any more when `prepare` has returned.
        max_seq_len: positions of the KV cache.
        dependent: programmatic dependent launch; where the GPU has it, if None.
        graphs: replay captured steps; without, kernels are launched one by one (to measure what that costs).
        decode: how decode steps run; `decode_path` has what was chosen.

    Raises:
        BackendError: no usable GPU, too little memory on it, or `decode` is not possible.
    """

    name = "cuda"

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        *,
        dependent: bool | None = None,
        graphs: bool = True,
        decode: Decode = "auto",
    ) -> None:
        self.geometry = geometry
        self._arrays: Mapping[str, NDArray[Any]] | None = weights
        self._max_seq_len = max_seq_len
        self._use_graphs = graphs
        self.compile_seconds = 0.0
        self._owner = DeviceResources()  # of all that is made on the GPU; must not refer to the backend
        try:
            self._gpu = self._owner.open()
            head: HeadFormat = "fp8" if f"{head_part(geometry)}.scale" in weights else "fp16"
            chip = chip_of(self._gpu)
            self.kernels, self.decode_path = kernels_for(geometry, chip, head, decode, dependent=dependent)
            self.prefill_chunk = min(self.kernels.block, max_seq_len)
            self.plan = cuda_plan(self.kernels, max_seq_len)
            self.device = f"{self._gpu.name}, CUDA {'.'.join(map(str, self._gpu.driver_version))}"
            with self._owner.current():
                self._allocate()
        except BaseException:
            with suppress(Exception):  # what went wrong first is what to tell
                self._owner.close()
            raise
        self._position = 0  # of the device, when all that is queued has run
        self._queued = 0  # number of the last token that the device will make
        self._wanted = 0  # number of the last token that was asked for
        self._sure = True  # whether these numbers are right: not after Ctrl-C between a launch and counting it

    def _allocate(self) -> None:
        made = self._owner.made
        self.stream = made.stream()
        self._arena = DeviceArena(self.plan, made)
        self._tokens = TokenChannel(self.stream, made)
        self._memory = DeviceMemory(self.stream)
        names = [buffer.name for buffer in self.plan.buffers if buffer.pool != "weights"]
        self._buffers = {name: self._arena[name] for name in names}
        self._weights = self._weight_views()
        self._persistent: PersistentStep | None = None
        self._traced: Kernel | None = None
        self._graphs: dict[tuple[int, Head, bool], Graph] = {}
        self._bound: dict[tuple[int, Head, bool], list[Launch]] = {}
        self._greedy = False  # whether the most likely token is the next one

    def _weight_buffers(self) -> dict[str, View]:
        return {buffer.name: self._arena[buffer.name] for buffer in self.plan.buffers if buffer.pool == "weights"}

    def _weight_views(self) -> Weights:
        projections, vectors = {}, {}
        for name, view in self._weight_buffers().items():
            if view.dtype == "float32":
                vectors[name] = view
            else:
                layout = self.kernels.layout_of(name)
                projections[name] = Weight(layout.rows, layout.columns, view)
        norms = {name: view for name, view in vectors.items() if name.endswith("_norm")}
        return Weights(projections, norms, {name: view for name, view in vectors.items() if name not in norms})

    # --- life and death ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give all memory of the GPU back. Closing twice is fine; every later use raises `ClosedError`."""
        self._arrays = None
        self._owner.close()

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile the kernels or load them from the cache, bring the weights to the device, capture the steps."""
        planned = self.kernels.planned
        started = time.perf_counter()
        codes = build([kernel.spec for kernel in planned.values()], self._gpu.capability, progress)
        self.compile_seconds = time.perf_counter() - started
        with self._owner.current():
            loaded = {spec.name: Kernel(spec, code, self._owner.made) for spec, code in codes.items()}
            self._upload(loaded, progress)
            scratch, ring = self._buffers.__getitem__, self._tokens.ring
            self._binder = Binder(self.kernels, loaded, scratch, ring, self.stream)
            if self.kernels.persistent:
                self._persistent = PersistentStep(
                    self.kernels, loaded, self._buffers, self._weight_buffers(), ring, self.stream
                )
                self._memory.write(self._buffers["persistent.table"], self._persistent.table())
            ready = self._graph if self._use_graphs else self._launches
            for tokens in range(1, self.prefill_chunk + 1):
                ready(tokens, NO_LOGITS)
                ready(tokens, SAMPLE)
            self._greedy = True
            ready(1, SAMPLE)  # which may end otherwise
            self.start(Sampler(SamplingParams(), self.geometry.vocabulary, ()))
            self.seek(0)
        self._arrays = None

    def _upload(self, loaded: Mapping[str, Kernel], progress: Progress | None) -> None:
        if self._arrays is None:
            raise RuntimeError("prepare was called before")
        uploader = Uploader(loaded, self._arena.behind("weights"), self.stream)
        upload(uploader, self._arrays, self._weight_buffers(), self.kernels.layout_of, progress)
        # Padding of activations must be zero, and counters start at zero; the cache holds what was staged: noise.
        self._arena.clear(("activations", "workspace"), self.stream)
        positions = self._buffers["rope.cosines"].shape[0]
        tables = rope.rope_table(rope_inverse_frequencies(self.geometry), positions)
        for name, table in zip(("rope.cosines", "rope.sines"), tables, strict=True):
            self._memory.write(self._buffers[name], table)
        self._forget_best()

    # --- what the engine calls ---------------------------------------------------------------------------------------

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step over `tokens` tokens."""
        return build_step(self.geometry, self._weights, self._buffers, tokens, head)

    def seek(self, position: int) -> None:
        """Set the position at which the next token will be written. Replays that were queued ahead are thrown away."""
        if self._sure and position == self._position and self._wanted == self._queued:
            return
        check_range("position", position, 0, self._max_seq_len)
        with self._owner.current():
            self._settle(position)

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""
        params = sampler.params
        temperature = max(params.temperature, LEAST_TEMPERATURE) if params.temperature else 0.0
        options = [temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty]
        seen = np.packbits(sampler.seen, bitorder="little")
        bitmap = np.pad(seen, (0, -len(seen) % 4)).view(np.uint32)
        with self._owner.current():
            self._memory.write(self._buffers["sampling.options"], np.array(options, np.float64))
            self._memory.write(self._buffers["sampling.generator"], np.array([sampler.seed, 0], np.uint64))
            self._memory.write(self._buffers["sampling.seen"], bitmap)
        self._greedy = params.greedy

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Run up to `prefill_chunk` tokens at the current position, and advance it. Does not wait."""
        with self._owner.current():
            self._check_step(tokens)
            self._tokens.send(tokens, self._buffers["tokens"])
            self._run(len(tokens), head)
        self._wanted = self._queued

    def _check_step(self, tokens: Sequence[int]) -> None:
        """Whether a step's kernels stay in the cache and in the embedding.

        Raises:
            IndexError: they would not.
        """
        check_range("positions", self._position, len(tokens), self._max_seq_len)
        check_indices("tokens", np.asarray(tokens), self.geometry.vocabulary)

    def decode(self) -> None:
        """Take the token that was sampled last through the model, sample the next one, and advance. Does not wait:
        some more steps are queued behind it, so that the GPU need not wait for the host.
        """
        self._wanted += 1
        with self._owner.current():
            while self._queued < self._wanted + AHEAD and self._position < self._max_seq_len:
                self._run(1, SAMPLE)
        if self._queued < self._wanted:
            raise RuntimeError("decode was called at the end of the context")  # the engine stops before

    def sampled_token(self) -> int:
        """The token that was asked for last; waits for it."""
        if self._owner.closed:  # the host's side of the ring is gone
            raise closed_sentence()
        try:
            return self._tokens.receive(self._wanted, self._check)
        except CheckpointError:
            self._check_waits()
            raise

    def _check_waits(self) -> None:
        """Raise if the persistent kernel gave up waiting for itself; its token is then marked as one without logits."""
        if self._persistent is None:
            return
        with self._owner.current():
            if self._memory.read(self._buffers["persistent.fault"])[0]:
                raise fault_sentence()

    def _check(self) -> None:
        """Raise if the GPU has failed, or has nothing to do any more and has not made the token that is waited for."""
        from cuda.bindings import driver

        with self._owner.current():
            (status,) = driver.cuStreamQuery(self.stream)
            if status == driver.CUresult.CUDA_ERROR_NOT_READY:
                return
            call("cuStreamSynchronize", self.stream)  # an error is raised here
            if int(self._memory.read(self._buffers["sampling.count"])[0]) < self._wanted:
                raise RuntimeError("the GPU has finished without the token that was waited for")

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy)."""
        rows = []
        with self._owner.current():
            # From row 0 on, all rows in one pass over the weights; one row, or some in the middle, each in its own.
            pieces = [(start, stop)] if start == 0 else [(row, row + 1) for row in range(start, stop)]
            for first, last in pieces:
                op = build_head(self.geometry, self._weights, self._buffers, first, last)
                self._observed(op, self._binder.bind(op, sampled=False), observer)
                rows.append(self._memory.read(op.logits))
        return np.concatenate(rows)

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` with an observer: the launches that the graph was captured from, one op at a time."""
        with self._owner.current():
            self._check_step(tokens)
            self._tokens.send(tokens, self._buffers["tokens"])
            self._sure = False
            for index, op in enumerate(self.step(len(tokens), head)):
                self._observed(op, self._alone(index, op, len(tokens), head), observer)
            self._count(len(tokens), head)
            self._wanted = self._queued

    def _alone(self, index: int, op: Op, tokens: int, head: Head) -> list[Launch]:
        """An op of a step by itself, reading what the views hold."""
        if self._persistent is not None and self._is_persistent(tokens, head) and index < self._persistent.shape.ops:
            return self._persistent.op_launches(index, op)
        if isinstance(op, Sample):
            self._forget_best()  # the persistent kernel has its arg-max where its logits are made
        return self._binder.bind(op, sampled=head.sample)

    # --- what `bench` and `profile` ask ------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading this GPU's memory, by loads and by TMA, measured now."""
        with self._owner.current():
            return measure_ceilings(self._gpu, self.stream, self._owner.made)

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops in order, each with the seconds of its kind; those of the persistent kernel with what
        each adds to a traced step.

        All others of a kind run one after the other, each with its own weights, in a graph of their own: a single op
        is shorter than what starting it by itself costs.
        """
        ops = self.step(1, SAMPLE)
        trace = self.trace_step(repeats)
        traced = [] if trace is None else list(zip(ops, trace.op_seconds, strict=False))
        if self._chooses(1, SAMPLE):
            return traced  # the persistent kernel makes the whole step
        bind = partial(self._binder.bind, sampled=True, ranked=trace is not None)
        kinds: dict[str, list[Op]] = {}
        for op in ops[len(traced) :]:
            kinds.setdefault(op.name.rpartition(".")[2], []).append(op)
        seconds = {}
        with self._measuring():
            for kind, members in kinds.items():
                launches = [launch for op in members for launch in bind(op)]
                each = time_launches(launches, self.stream, repeats, self._owner.made)
                seconds[kind] = each * len(launches) / len(members)
        return traced + [(op, seconds[op.name.rpartition(".")[2]]) for op in ops[len(traced) :]]

    def time_step(self, repeats: int) -> float:
        """Median seconds of the decode step's graph.

        Raises:
            BackendError: the persistent kernel gave up waiting for itself.
        """
        with self._measuring():
            position = self._memory.read(self._buffers["position"])
            graph = self._graph(1, SAMPLE)
            times = time_graph(graph, repeats, lambda: self._memory.write(self._buffers["position"], position))
            self._check_waits()
        return float(np.median(times))

    def trace_step(self, repeats: int, progress: Progress | None = None) -> StepTrace | None:
        """When each block of the persistent kernel did what, in that of `repeats` runs which is the median by length;
        None without that kernel. The kernel that takes the times is compiled, or loaded from the cache, on first use.

        Raises:
            BackendError: it could not be compiled, or gave up waiting for itself.
        """
        if self._persistent is None:
            return None
        traces, times = [], self._buffers["persistent.times"]
        ops = self.step(1, SAMPLE)
        with self._measuring():
            if self._traced is None:
                spec = self.kernels.persistent_traced.spec
                code = build([spec], self._gpu.capability, progress)[spec]
                self._traced = Kernel(spec, code, self._owner.made)
            position = self._memory.read(self._buffers["position"])
            made = self._persistent.shape.ops
            whole = self._persistent.launch(0, made, choose=self._chooses(1, SAMPLE), traced=self._traced)
            launches = [whole, *self._launches(1, SAMPLE)[1:]]  # behind it what every step ends with
            for _ in range(repeats + 1):
                self._memory.write(times, np.zeros(times.shape, np.int64))
                self._memory.write(self._buffers["position"], position)
                for launch in launches:
                    launch.run()
                traces.append(self._persistent.trace(ops, self._memory.read(times)))
            self._check_waits()
        return sorted(traces[1:], key=lambda trace: trace.ends[-1])[(repeats - 1) // 2]

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Position and count of tokens are put right afterwards."""
        position = self._position
        check_range("positions", position, 1, self._max_seq_len)
        self._sure = False
        with self._owner.current():
            yield
            self._settle(position)

    # --- steps -------------------------------------------------------------------------------------------------------

    def _settle(self, position: int) -> None:
        """Wait for all that is queued, count its tokens as seen, and set the position."""
        self._sure = False
        self._memory.write(self._buffers["position"], np.array([position]))
        self._forget_best()  # a step may have ended between its arg-max and its end
        if self._persistent is not None:
            self._persistent.begin_anew(self._memory)
        self._queued = self._wanted = int(self._memory.read(self._buffers["sampling.count"])[0])
        self._position = position
        self._sure = True

    def _forget_best(self) -> None:
        """Make ready for an arg-max."""
        self._memory.write(self._buffers["sampling.best"], np.array([LOWEST_KEY]))

    def _observed(self, op: Op, launches: Sequence[Launch], observer: Observer | None) -> None:
        if observer:
            observer.before(op, self._memory)
        for launch in launches:
            launch.run()
        if observer:
            observer.after(op, self._memory)

    def _run(self, tokens: int, head: Head) -> None:
        self._sure = False
        if self._use_graphs:
            self._graph(tokens, head).replay()
        else:
            for launch in self._launches(tokens, head):
                launch.run()
        self._count(tokens, head)

    def _count(self, tokens: int, head: Head) -> None:
        self._position += tokens
        if head.sample:
            self._queued += 1
        self._sure = True

    def _launches(self, tokens: int, head: Head) -> list[Launch]:
        """The launches of a step, with their arguments in place."""
        choose = self._chooses(tokens, head)
        key = tokens, head, choose
        if key not in self._bound:
            ops = self.step(tokens, head)
            launches, ranked = [], False
            if self._persistent is not None and self._is_persistent(tokens, head):
                made, ranked = self._persistent.shape.ops, True
                launches.append(self._persistent.launch(0, made, choose=choose))
                ops = [] if choose else ops[made:]
            for op in ops:
                launches += self._binder.bind(op, sampled=head.sample, ranked=ranked)
            self._bound[key] = launches
        return self._bound[key]

    def _is_persistent(self, tokens: int, head: Head) -> bool:
        """Whether a step is the one that the persistent kernel makes: a token for a token."""
        return tokens == 1 and head == SAMPLE

    def _chooses(self, tokens: int, head: Head) -> bool:
        """Whether the persistent kernel takes the next token as well: the most likely one."""
        return self._persistent is not None and self._greedy and self._is_persistent(tokens, head)

    def _graph(self, tokens: int, head: Head) -> Graph:
        key = tokens, head, self._chooses(tokens, head)
        if key not in self._graphs:
            self._graphs[key] = Graph(self._launches(tokens, head), self.stream, self._owner.made)
        return self._graphs[key]
