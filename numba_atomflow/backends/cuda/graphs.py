"""A model's steps as launches, and as CUDA graphs captured from them.

A graph refers to the model's static buffers and is never patched: what changes from step to step is in device memory.
Few graphs are needed, because a prefill chunk is padded to a GEMV width or a bucket: the layers of all shorter chunks
replay the graph of that size, and the step's tail, which depends on the number of tokens, is launched after it: the LM
head of the chosen rows, sampling, and the advance of the position. These few launches are queued while the layers run.
A chunk of a few tokens may run in the persistent kernel instead, which has the LM head for all of them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from numba_atomflow.backends.cuda.bind import Binder
from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.persistent import PersistentStep
from numba_atomflow.device.resources import Resources
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Advance, Head, LmHead, Op, Sample
from numba_atomflow.ops.cuda.runtime.graph import Graph
from numba_atomflow.ops.cuda.runtime.launch import Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels


class _Step(NamedTuple):
    """The key of a bound or captured step. A head of None: the layers of a padded step, without its tail.

    Attributes:
        fused_sampling: the persistent kernel also samples, which makes the launch the whole step.
        logprobs: those of the sampled token are computed, too.
        wide: the layers of several tokens run in the persistent kernel, which also has the LM head.
    """

    tokens: int
    head: Head | None
    fused_sampling: bool = False
    logprobs: bool = False
    wide: bool = False


class StepGraphs:
    """Runs steps; owns their launches and graphs.

    Args:
        loaded: kernels by name.
        ring, logprob_ring: the host's, to which sampled tokens and what is said of them are posted.
        resources: owns the graphs.
        capture: replay graphs; otherwise every kernel is launched by itself (to measure what that costs).

    Attributes:
        persistent: the persistent decode kernel, if decode steps run in it.
        greedy: the most likely token is the next one; the persistent kernel then samples as well.
        logprobs: steps that sample a token compute its log-probabilities, too; in kernels of their own.
        edited_decode: puts a decode step under edits into the stream (`edits.DeviceEdits`); None without edits.
    """

    def __init__(
        self,
        model: DeviceModel,
        loaded: LoadedKernels,
        ring: View,
        logprob_ring: View,
        resources: Resources,
        *,
        capture: bool,
    ) -> None:
        self._model, self._kernels, self._resources = model, model.kernels, resources
        self._capture, self._loaded = capture, loaded
        self._binder = Binder(model, loaded, ring, logprob_ring)
        self.persistent: PersistentStep | None = None
        if self._kernels.persistent:
            self.persistent = PersistentStep(
                self._kernels, loaded, model.buffers, model.weight_views, ring, model.stream
            )
            model.memory.write(model.buffers["persistent.table"], self.persistent.table())
        self.greedy, self.logprobs = True, False
        self.edited_decode: Callable[[], None] | None = None
        self._launches: dict[_Step, list[Launch]] = {}
        self._tails: dict[tuple[int, Head, bool], list[Launch]] = {}
        self._graphs: dict[_Step, Graph] = {}

    def prepare(self, prefill_chunk: int) -> None:
        """Bind, and capture, the steps that every generation runs; others, and all of the GEMM path, on first use."""
        self._ready(_Step(1, SAMPLE))
        if self.persistent is not None:
            self._ready(_Step(1, SAMPLE, fused_sampling=True))
        if self._kernels.prefill is not None:
            return
        self._ready(self._key(prefill_chunk, NO_LOGITS))
        if prefill_chunk > 1:
            self._ready(_Step(self._kernels.width_for(prefill_chunk), None))

    def run(self, tokens: int, head: Head) -> None:
        """Put a step into the stream."""
        if self.edited_decode is not None and is_decode(tokens, head):
            self.edited_decode()
            return
        key = self._key(tokens, head)
        if not self._capture:
            for launch in self.launches(tokens, head):
                launch.run()
        elif key in self._graphs or is_decode(tokens, head):
            self._graph(key).replay()
        else:
            self._graph(self._chunk(tokens)).replay()
            for launch in self._tail(key.tokens, head, logprobs=key.logprobs):
                launch.run()

    def decode_graph(self) -> Graph:
        """The graph of a decode step."""
        return self._graph(self._key(1, SAMPLE))

    def launches(self, tokens: int, head: Head) -> Sequence[Launch]:
        """The launches of a whole step."""
        return self._bound(self._key(tokens, head))

    def chunk_launches(self, tokens: int) -> Sequence[Launch]:
        """The launches of a padded chunk's embedding and layers; where they are one, the LM head is part of it."""
        return self._bound(self._chunk(tokens))

    def op_launches(self, op: Op, index: int, tokens: int, head: Head) -> list[Launch]:
        """Op number `index` of a step by itself, reading what the views hold."""
        if self.persistent is not None and is_decode(tokens, head) and index < self.persistent.shape.ops:
            return self.persistent.op_launches(index)
        if isinstance(op, Sample):
            self._model.reset_argmax()  # the persistent kernel computes the arg-max in the LM head
        return self._binder.bind(op, sampled=head.sample, logprobs=head.sample and self.logprobs)

    def bind(self, op: Op, *, sampled: bool = False, argmax_done: bool = False, logprobs: bool = False) -> list[Launch]:
        """The launches of an op, as those of `Binder.bind`."""
        return self._binder.bind(op, sampled=sampled, argmax_done=argmax_done, logprobs=logprobs)

    @property
    def samples_in_kernel(self) -> bool:
        """Whether the persistent kernel makes the whole decode step, with the next token."""
        return self.persistent is not None and self.greedy and not self.logprobs

    # --- launches and graphs -----------------------------------------------------------------------------------------

    def _key(self, tokens: int, head: Head) -> _Step:
        fused = is_decode(tokens, head) and self.samples_in_kernel
        return _Step(tokens, head, fused, head.sample and self.logprobs)

    def _chunk(self, tokens: int) -> _Step:
        """The layers of a chunk, padded."""
        columns = self._kernels.prompt_columns(tokens)
        if columns is not None:
            return _Step(columns, None, wide=True)
        return _Step(self._kernels.width_for(tokens), None)

    def _ready(self, key: _Step) -> None:
        if self._capture:
            self._graph(key)
        else:
            self._bound(key)

    def _graph(self, key: _Step) -> Graph:
        if key not in self._graphs:
            self._graphs[key] = Graph(self._bound(key), self._model.stream, self._resources)
        return self._graphs[key]

    def _bound(self, key: _Step) -> list[Launch]:
        if key not in self._launches:
            self._launches[key] = self._bind_step(key)
        return self._launches[key]

    def _bind_step(self, key: _Step) -> list[Launch]:
        tokens, head = key.tokens, key.head
        if key.wide and self.persistent is not None:
            return [self.persistent.prompt_launch(tokens)]
        if head is None:
            self._loaded.require(kernel.spec for kernel in self._kernels.layer_kernels(tokens))
            layers, _ = split_tail(self._model.step(tokens, NO_LOGITS))
            return self._bind_ops(layers)
        if self.persistent is not None and is_decode(tokens, head):
            kernel_ops = self.persistent.shape.ops
            launches = [self.persistent.launch(0, kernel_ops, greedy=key.fused_sampling)]
            ops = [] if key.fused_sampling else self._model.step(tokens, head)[kernel_ops:]
            return launches + self._bind_ops(ops, sampled=True, argmax_done=True, logprobs=key.logprobs)
        return self._bound(self._chunk(tokens)) + self._tail(tokens, head, logprobs=key.logprobs)

    def _bind_ops(self, ops: Sequence[Op], **how: bool) -> list[Launch]:
        return [launch for op in ops for launch in self.bind(op, **how)]

    def _tail(self, tokens: int, head: Head, *, logprobs: bool) -> list[Launch]:
        """The launches after the layers: LM head, if they do not have it, sampling, and the advance of the position."""
        key = tokens, head, logprobs
        if key not in self._tails:
            ops = self._model.tail(tokens, head)
            self._tails[key] = self._bind_ops(ops, sampled=head.sample, logprobs=logprobs)
        return self._tails[key]


def is_decode(tokens: int, head: Head) -> bool:
    """Whether a step is a decode step: one token in, one token out."""
    return tokens == 1 and head == SAMPLE


def split_tail(ops: Sequence[Op]) -> tuple[Sequence[Op], Sequence[Op]]:
    """A step's ops up to the last layer, and those after it."""
    end = next(i for i, op in enumerate(ops) if isinstance(op, LmHead | Advance))
    return ops[:end], ops[end:]
