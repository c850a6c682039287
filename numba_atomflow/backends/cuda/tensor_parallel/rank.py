"""One rank on its GPU: its memory, its kernels, and the launches of a step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.logprob_ring import LogprobRing
from numba_atomflow.backends.cuda.model import STAGED_BYTES, SamplerWriter
from numba_atomflow.backends.cuda.persistent import kv_stride, step_views, weight_table
from numba_atomflow.backends.cuda.plan import SamplingState
from numba_atomflow.backends.cuda.queue import TokenRing
from numba_atomflow.backends.cuda.tensor_parallel.columns import RankColumns
from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels
from numba_atomflow.device.driver import Device, call
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.memory.device import DeviceArena, DeviceMemory, StagedWrites
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.memory.view import View
from numba_atomflow.model.rope_tables import rope_tables
from numba_atomflow.ops.cuda.persistent.publish import RankPublishArguments
from numba_atomflow.ops.cuda.persistent.rank import APART, GREEDY, PROMPT, SAMPLED, RankArguments, peers_of
from numba_atomflow.ops.cuda.persistent.trace import EVENTS, to_nanoseconds
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.runtime.upload import Matrix, Uploader, release_matrices, stored_matrices
from numba_atomflow.ops.cuda.token.advance import AdvanceArguments
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.logprobs import LogprobsArguments
from numba_atomflow.ops.cuda.token.order import LOWEST_KEY
from numba_atomflow.ops.cuda.token.sample import SampleArguments
from numba_atomflow.sampling import Sampler
from numba_atomflow.utils.progress import Progress


class Rank:
    """One GPU's part of a model. Everything but the constructor expects its context to be current.

    Args:
        owner: of everything on the GPU.

    Attributes:
        buffers: all views but the weights, by name. weight_views: those of the weights.
        memory: reads and writes views. staged: writes without waiting.
        loaded: kernels by name, after `load_kernels`. columns: steps of several tokens, after `bind`.
        ring, logprob_ring: to which this rank posts tokens, and what is said of them; the host reads rank 0's.

    Raises:
        BackendError: the GPU has too little free memory.
    """

    def __init__(
        self, number: int, kernels: RankKernels, plan: MemoryPlan, device: Device, owner: DeviceResources
    ) -> None:
        self.number, self.kernels, self.device, self.owner = number, kernels, device, owner
        resources = owner.resources
        with owner.current():
            self.stream = resources.stream()
            self._arena = DeviceArena(plan, resources)
            self.memory = DeviceMemory(self.stream)
            self.ring, self.logprob_ring = TokenRing(resources), LogprobRing(resources)
            self.staged = StagedWrites(STAGED_BYTES, self.stream, resources)
        self.buffers = {b.name: self._arena[b.name] for b in plan.buffers if b.pool != "weights"}
        self.weight_views = {b.name: self._arena[b.name] for b in plan.buffers if b.pool == "weights"}
        self._sampling = SamplingState.of(self.buffers)
        self._sampler_writer = SamplerWriter(self.staged, self._sampling)

    # --- loading -----------------------------------------------------------------------------------------------------

    def load_kernels(self, progress: Progress | None) -> float:
        """Compile the kernels that every reply needs, or read them from the cache. Others are loaded while no rank runs
        a step: a kernel that waits for another rank's may keep the driver from loading one. Returns the seconds that
        this took.
        """
        self.loaded = LoadedKernels(self.kernels.planned, self.device.capability, self.owner.resources)
        self.loaded.require([planned.spec for planned in self.kernels.planned.values()], progress)
        self._uploader = Uploader(self.loaded, self._arena.space_after("weights"), self.stream)
        return self.loaded.seconds

    def upload_vector(self, part: str, values: NDArray[np.float32]) -> None:
        """Copy a norm's weights, or this rank's rows of a bias, of which `values` has all."""
        rows = [values[span] for span in self.kernels.sharding.rows(part, self.number)]
        self._uploader.vector(np.concatenate(rows) if len(rows) > 1 else rows[0], self.weight_views[part])

    def upload_projection(self, part: str, stored: Sequence[Matrix]) -> None:
        """Copy and prepack this rank's rows of a projection, of which `stored` has all: codes and scales, or float16
        weights.
        """
        rows = self.kernels.sharding.rows(part, self.number)
        layout = self.kernels.layout_of(part, sum(span.stop - span.start for span in rows))
        self._uploader.projection(layout, stored, self.weight_views[part], _ignore, rows)

    def initialise(self, max_seq_len: int) -> None:
        """Everything but the weights, which have been uploaded."""
        self._arena.clear(("activations", "workspace"), self.stream)
        positions = self.buffers["rope.cosines"].shape[0]
        for name, table in rope_tables(self.kernels.geometry, positions, max_seq_len):
            self.memory.write(self.buffers[name], table)
        self.memory.write(self.buffers["persistent.table"], weight_table(self.kernels.geometry, self.weight_views))
        self.reset_argmax()

    def bind(self, others: Sequence["Rank"]) -> None:
        """Make the launches, which need the addresses of all ranks."""
        self._others = others
        end = self.kernels.persistent_shape.ops
        self._prompt = [self.step_launch(0, end - 1, PROMPT)]
        self._head = [self.step_launch(end - 1, end, APART, steps_back=1)]
        self._greedy = [self.step_launch(0, end, GREEDY)]
        sample, logprobs, advance = self.sample_launches(self.buffers["logits"])
        step = self.step_launch(0, end, SAMPLED)
        self._sampled = [step, sample, advance]
        self._with_logprobs = [step, sample, logprobs, advance]
        self.columns = RankColumns(self)
        self.columns.restart(0)

    def step_launch(
        self,
        first_op: int,
        end_op: int,
        ending: int,
        traced: Planned | None = None,
        *,
        steps_back: int = 0,
        replaced: Mapping[str, View] | None = None,
    ) -> Launch:
        """Ops first_op .. end_op - 1 of a step of one token, by the kernel `traced`, if given; `ending` and
        `steps_back` are those of `RankArguments`. replaced: views in place of those of decode steps, by its names.
        """
        b, shape = self.buffers, self.kernels.persistent_shape
        arguments = RankArguments(
            **step_views(b, self.weight_views, self.ring.view),
            **self.of_others("mailbox", "persistent.mailbox"),
            **self.of_others("logits", "logits"),
            first_op=first_op,
            end_op=end_op,
            rank=self.number,
            steps_back=steps_back,
            ending=ending,
        )
        kernel = self.loaded[traced.spec.name if traced else "persistent_rank"]
        return Launch(kernel, shape.sms, arguments._replace(**replaced or {}), self.stream)

    def of_others(self, field: str, buffer: str) -> dict[str, View]:
        """The other ranks' arguments of a kernel."""
        return peers_of(field, [other.buffers[buffer] for other in self._others], self.buffers[buffer])

    def bind_traced(self, progress: Progress | None) -> None:
        """Make the launch of a greedy step that is traced; compiles its kernel, or loads it from the cache."""
        traced = self.kernels.traced
        self.loaded.require([traced.spec], progress)
        self._traced = [self.step_launch(0, self.kernels.persistent_shape.ops, GREEDY, traced)]

    def bind_ops(self) -> None:
        """Make the launches of ops by themselves; compiles their kernels, or loads them from the cache."""
        self.loaded.require([self.kernels.publish.spec])
        shape, head = self.kernels.persistent_shape, self.kernels.persistent_shape.op_index.lm_head
        self._ops = [[self.step_launch(*ops, APART) for ops in shape.launches_of(op)] for op in range(head + 1)]
        self._ends = {ending: self.step_launch(head, head, ending) for ending in (SAMPLED, PROMPT)}
        logits = self.buffers["logits"]
        argmax, (sample, logprobs, self._post) = self.argmax_launch(logits), self.sample_launches(logits)
        self._choices = {False: [argmax, sample], True: [argmax, sample, logprobs]}

    def argmax_launch(self, logits: View) -> Launch:
        """The kernel that finds the most likely token, with which sampling begins."""
        state = self._sampling
        arguments = ArgmaxArguments(logits, state.seen, state.options, state.best)
        return Launch(self.loaded["argmax"], self.kernels.planned["argmax"].ctas, arguments, self.stream)

    def sample_launches(self, logits: View, tokens: int = 1) -> list[Launch]:
        """The kernels `sample`, `logprobs` and `advance_sampled`, of the logits of one token; the position then moves
        by `tokens`.
        """
        b, state = self.buffers, self._sampling
        arguments = {
            "sample": SampleArguments(
                logits=logits,
                seen=state.seen,
                options=state.options,
                generator=state.generator,
                best=state.best,
                sums=state.sums,
                token=b["tokens"],
            ),
            "logprobs": LogprobsArguments(logits, b["tokens"], state.tokens_posted, self.logprob_ring.view),
            "advance_sampled": AdvanceArguments(
                token=b["tokens"],
                best=state.best,
                position=b["position"],
                seen=state.seen,
                token_ring=self.ring.view,
                tokens_posted=state.tokens_posted,
                tokens=tokens,
            ),
        }
        planned = self.kernels.planned
        return [Launch(self.loaded[name], planned[name].ctas, a, self.stream) for name, a in arguments.items()]

    # --- steps -------------------------------------------------------------------------------------------------------

    def send(self, token: int) -> None:
        """The token of the next step, which the host has chosen."""
        self.staged.write(self.buffers["tokens"], [token])

    def run_prompt(self) -> None:
        """A step without logits."""
        _run(self._prompt)

    def run_head(self) -> None:
        """The logits of the last step."""
        _run(self._head)

    def run_decode(self, *, greedy: bool, logprobs: bool) -> None:
        """A step with the next token."""
        _run(self._with_logprobs if logprobs else self._greedy if greedy else self._sampled)

    def run_op(self, op: int) -> None:
        """One op, which reads what has been published; its step does not end."""
        _run(self._ops[op])

    def publish(self, layer: int, *, steps_back: int = 0) -> None:
        """What the views hold, to the mailboxes of the ranks that read it in this layer, or in the LM head, whose layer
        is the number of layers. steps_back: 1 for that of the step that was completed last.
        """
        b, planned = self.buffers, self.kernels.publish
        arguments = RankPublishArguments(
            residual=b["residual"],
            q=b["q"],
            cache=b[KV_CACHE],
            attn_out=b["attn_out"],
            intermediate=b["intermediate"],
            mailbox=b["persistent.mailbox"],
            position=b["position"],
            steps=b["persistent.steps"],
            **self.of_others("mailbox", "persistent.mailbox"),
            kv_stride=kv_stride(b[KV_CACHE]),
            layer=layer,
            rank=self.number,
            steps_back=steps_back,
        )
        _run([Launch(self.loaded["publish"], planned.ctas, arguments, self.stream)])

    def end_step(self, ending: int) -> None:
        """A step whose ops have run by themselves ends, as `RankArguments.ending` says."""
        _run([self._ends[ending]])

    def choose_token(self, *, logprobs: bool) -> None:
        """The next token, of the logits that this rank has."""
        _run(self._choices[logprobs])

    def post_token(self) -> None:
        """The chosen token to the host; the position moves."""
        _run([self._post])

    def run_traced(self) -> None:
        """A greedy step of the kernel that writes timestamps."""
        _run(self._traced)

    def clear_times(self) -> None:
        """Before a traced step."""
        times = self.buffers["persistent.timestamps"]
        self.memory.write(times, np.zeros(times.shape, np.int64))

    def read_times(self) -> NDArray[np.float64]:
        """Of the last traced step, [CTAs, ops, EVENTS] in nanoseconds by this GPU's clock."""
        shape, recorded = self.kernels.persistent_shape, self.memory.read(self.buffers["persistent.timestamps"])
        return to_nanoseconds(recorded.reshape(shape.sms, shape.ops, EVENTS))

    def set_sampler(self, sampler: Sampler) -> None:
        """Options, seed and context of the tokens to sample from here on."""
        self._sampler_writer.write(sampler)

    def set_position(self, position: int) -> None:
        """The position at which the next token is written."""
        self.staged.write(self.buffers["position"], [position])

    def reset_argmax(self) -> None:
        """Clear the running arg-max of the logits."""
        self.memory.write(self._sampling.best, np.array([LOWEST_KEY]))

    def steps(self) -> int:
        """Completed steps of the kind, by number of tokens, that has completed most."""
        return max(int(self.memory.read(self.buffers["persistent.steps"])[0]), self.columns.steps())

    def restart(self, steps: int, position: int) -> None:
        """Go on after a step that may have failed, with a count of steps greater than any rank's."""
        self.set_position(position)
        self.reset_argmax()
        self.memory.write(self.buffers["persistent.steps"], np.array([steps, 0]))
        self.memory.write(self.buffers["persistent.fault"], np.zeros(1, np.int32))
        self.columns.restart(steps)

    def faulty(self) -> bool:
        """Whether a watchdog tripped."""
        return bool(self.memory.read(self.buffers["persistent.fault"])[0])

    def posted_tokens(self) -> int:
        """Tokens posted so far."""
        return int(self.memory.read(self._sampling.tokens_posted)[0])

    def set_posted_tokens(self, count: int) -> None:
        """After a step that only some ranks have completed."""
        self.memory.write(self._sampling.tokens_posted, np.array([count]))

    def wait(self) -> None:
        """Wait for all steps.

        Raises:
            DriverError: one failed.
        """
        call("cuStreamSynchronize", self.stream)


def upload(ranks: Sequence[Rank], arrays: Mapping[str, NDArray[Any]], progress: Progress | None) -> None:
    """Copy each rank's rows of all weights to its GPU, and prepack them there: the checkpoint's parts one after the
    other, each row once.

    Args:
        arrays: of the checkpoint, by name.
        progress: called with a text, MB done and MB in total.
    """
    total, done = sum(view.nbytes for rank in ranks for view in rank.weight_views.values()), 0
    for part in ranks[0].weight_views:
        vector = arrays.get(part)
        stored = [] if vector is not None else stored_matrices(arrays, part)
        for rank in ranks:
            with rank.owner.current():
                if vector is not None:
                    rank.upload_vector(part, vector)
                else:
                    rank.upload_projection(part, stored)
                done += rank.weight_views[part].nbytes
                if progress:
                    progress("weights to the GPUs", done >> 20, total >> 20)
        release_matrices(arrays, part)


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch.run()


def _ignore(count: int) -> None:
    """The bytes of a piece: progress is counted by parts."""
