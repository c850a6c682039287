"""The persistent kernel bound to a model's memory: the whole decode step, or some of its ops, as a launch."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.device.driver import call
from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.device import DeviceMemory
from numba_atomflow.memory.kv_cache import NAME as KV_CACHE
from numba_atomflow.memory.plan import Buffer
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Op
from numba_atomflow.ops.cuda.persistent.kernel import PersistentArguments
from numba_atomflow.ops.cuda.persistent.publish import PublishArguments
from numba_atomflow.ops.cuda.persistent.schedule import TABLE_UNIT, PersistentShape
from numba_atomflow.ops.cuda.persistent.trace import (
    BEGUN,
    COPY_BEGUN,
    COPY_DONE,
    DONE,
    EVENTS,
    STAGED,
    WAITED,
    to_nanoseconds,
)
from numba_atomflow.ops.cuda.persistent.wide_kernel import WideArguments
from numba_atomflow.ops.cuda.persistent.wide_vectors import ABSENT
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch
from numba_atomflow.ops.cuda.token.sample import LAYOUT

_BYTES = 4 * TABLE_UNIT  # unit of the offsets in the table


def persistent_buffers(shape: PersistentShape) -> list[Buffer]:
    """Buffers of the kernel beside those of every decode step."""
    events = shape.sms * shape.ops * EVENTS
    return [
        Buffer("workspace", "persistent.mailbox", (shape.mailbox.end,), "uint64"),
        Buffer("workspace", "persistent.table", (shape.table_entries,), "int64"),
        Buffer("workspace", "persistent.steps", (2,), "int64"),
        Buffer("workspace", "persistent.fault", (1,), "int32"),
        Buffer("workspace", "persistent.timestamps", (events,), "int64"),
    ]


def verification_buffers(shapes: Mapping[int, PersistentShape], vocabulary: int) -> list[Buffer]:
    """Buffers of steps of several tokens. Each width has a mailbox of its own: each step overwrites all of it.

    Args:
        shapes: by their number of columns.
    """
    width, seen_words = max(shapes, default=1), -(-vocabulary // 32)
    buffers = [
        Buffer("workspace", "verify.step", (2 + (width + 1) // 2,), "int64"),
        Buffer("workspace", "verify.logits", (width, vocabulary), "float32"),
        Buffer("workspace", "verify.best", (width,), "int64"),
        Buffer("workspace", "verify.seen", (seen_words,), "uint32"),
        Buffer("workspace", "verify.options", (5,), "float64"),
        Buffer("workspace", "verify.tokens_posted", (width,), "int64"),
        Buffer("workspace", "verify.generators", (width, 2), "uint64"),
        Buffer("workspace", "verify.sums", (width, LAYOUT.sums_words), "int64"),
        Buffer("workspace", "verify.sampled", (width,), "int32"),
        Buffer("workspace", "verify.seen_rows", (width, seen_words), "uint32"),
        Buffer("workspace", "prompt.choices", (width,), "uint64"),
    ]
    for columns, shape in shapes.items():
        buffers.append(Buffer("workspace", f"verify.mailbox_x{columns}", (shape.mailbox.end,), "uint64"))
        vectors = (2, shape.layers, shape.vector_words)
        buffers.append(Buffer("workspace", f"verify.vectors_x{columns}", vectors, "uint32"))
        buffers.append(Buffer("workspace", f"verify.steps_x{columns}", (2,), "int64"))
    return buffers


class WideViews(NamedTuple):
    """What a step of several tokens reads, and where it posts the most likely tokens.

    Attributes:
        position: [1]; of the first token. tokens: [width].
        choices: [width]; the most likely token after each, as `post_token` posts token number 1.
    """

    position: View
    tokens: View
    choices: View


class PersistentStep:
    """Launches of the persistent kernel.

    Args:
        loaded: kernels by name. buffers: all views but the weights, by name. weights: views of the weights by name.
        token_ring: pinned host memory to which tokens are posted.
    """

    def __init__(
        self,
        kernels: ModelKernels,
        loaded: Mapping[str, Kernel],
        buffers: Mapping[str, View],
        weights: Mapping[str, View],
        token_ring: View,
        stream: Any,
    ) -> None:
        self._kernels, self._loaded, self._stream = kernels, loaded, stream
        self._buffers, self._weights, self._token_ring = buffers, weights, token_ring
        self.shape = kernels.persistent_shape

    def table(self) -> NDArray[np.int64]:
        """As `weight_table`."""
        return weight_table(self._kernels.geometry, self._weights)

    def launch(
        self,
        first_op: int,
        end_op: int,
        *,
        greedy: bool = False,
        traced: Kernel | None = None,
        replaced: Mapping[str, View] | None = None,
    ) -> Launch:
        """Ops first_op .. end_op - 1 of the step, numbered by `OpIndex`; by the kernel `traced`, if given.
        greedy: the most likely token is the next one, and the step ends with this launch. replaced: views in place of
        those of a decode step, by the names of `PersistentArguments`.
        """
        views = step_views(self._buffers, self._weights, self._token_ring)
        arguments = PersistentArguments(**views, first_op=first_op, end_op=end_op, greedy=int(greedy))
        kernel = traced or self._loaded["persistent"]
        return Launch(kernel, self.shape.sms, arguments._replace(**replaced or {}), self._stream)

    def wide_launch(self, columns: int, views: WideViews, traced: Kernel | None = None) -> Launch:
        """A step of so many tokens, which leaves the position as it is; by the kernel `traced`, if given."""
        b, planned = self._buffers, self._kernels.planned[f"persistent_x{columns}"]
        cache = b[KV_CACHE]
        arguments = WideArguments(
            weights=all_weights(self._weights),
            table=b["persistent.table"],
            cache16=cache,
            cache=cache,
            mailbox=b[f"verify.mailbox_x{columns}"],
            vectors=b[f"verify.vectors_x{columns}"],
            tokens=views.tokens,
            position=views.position,
            steps=b[f"verify.steps_x{columns}"],
            cosines=b["rope.cosines"],
            sines=b["rope.sines"],
            logits=b["verify.logits"],
            best=b["verify.best"],
            choices=views.choices,
            fault=b["persistent.fault"],
            timestamps=b["persistent.timestamps"],
            kv_stride=self._kv_stride,
            first_op=0,
            end_op=self.shape.ops,
        )
        return Launch(traced or self._loaded[planned.spec.name], planned.ctas, arguments, self._stream)

    def prompt_launch(self, columns: int) -> Launch:
        """A prompt's step of so many tokens, at the position of the next token. The most likely ones are not read."""
        b = self._buffers
        return self.wide_launch(columns, WideViews(b["position"], b["tokens"], b["prompt.choices"]))

    def publish(self, layer: int) -> Launch:
        """The mailbox words that let an op of this layer run by itself; the number of layers: the LM head."""
        b, planned = self._buffers, self._kernels.planned["publish"]
        arguments = PublishArguments(
            residual=b["residual"],
            q=b["q"],
            cache=b[KV_CACHE],
            attn_out=b["attn_out"],
            intermediate=b["intermediate"],
            mailbox=b["persistent.mailbox"],
            position=b["position"],
            steps=b["persistent.steps"],
            kv_stride=self._kv_stride,
            layer=layer,
        )
        return Launch(self._loaded["publish"], planned.ctas, arguments, self._stream)

    def trace(self, ops: Sequence[Op], timestamps: NDArray[np.int64]) -> StepTrace:
        """Of a traced launch of a whole step, from its `persistent.timestamps`: int64 [CTAs * ops * EVENTS]."""
        return step_trace(ops, to_nanoseconds(timestamps.reshape(self.shape.sms, self.shape.ops, EVENTS)))

    def reset(self, memory: DeviceMemory) -> None:
        """After a step that may be incomplete or have failed: the next one uses epochs of its own."""
        for name in ("persistent.steps", *(f"verify.steps_x{columns}" for columns in self._kernels.wide_shapes)):
            steps = int(memory.read(self._buffers[name])[0])
            memory.write(self._buffers[name], np.array([steps + 1, 0]))
        memory.write(self._buffers["persistent.fault"], np.zeros(1, np.int32))
        self.clear_vectors()

    def clear_vectors(self) -> None:
        """As steps of several tokens need their vectors: of no step (`wide_vectors.py`)."""
        for columns in self._kernels.wide_shapes:
            view = self._buffers[f"verify.vectors_x{columns}"]
            call("cuMemsetD32Async", view.address, ABSENT, view.nbytes // 4, self._stream)

    @property
    def _kv_stride(self) -> int:
        """As in `PersistentArguments`."""
        return kv_stride(self._buffers[KV_CACHE])

    def op_launches(self, index: int) -> list[Launch]:
        """One op by itself, which reads the buffers instead of results of the same launch."""
        layer = self.shape.op_index.layer(index)
        return [self.publish(layer), *(self.launch(first, end) for first, end in self.shape.launches_of(index))]


def step_views(buffers: Mapping[str, View], weights: Mapping[str, View], token_ring: View) -> dict[str, Any]:
    """The arguments of a decode step that the kernels of one GPU and of several have, by name.

    Args:
        buffers, weights, token_ring: as those of `PersistentStep`.
    """
    b, cache = buffers, buffers[KV_CACHE]
    return {
        "weights": all_weights(weights),
        "table": b["persistent.table"],
        "cache16": cache,
        "cache": cache,
        "mailbox": b["persistent.mailbox"],
        "tokens": b["tokens"],
        "position": b["position"],
        "steps": b["persistent.steps"],
        "cosines": b["rope.cosines"],
        "sines": b["rope.sines"],
        "residual": b["residual"],
        "x_norm": b["x_norm"],
        "final_x_norm": b["final_x_norm"],
        "q": b["q"],
        "attn_out": b["attn_out"],
        "intermediate": b["intermediate"],
        "logits": b["logits"],
        "seen": b["sampling.seen"],
        "options": b["sampling.options"],
        "best": b["sampling.best"],
        "token_ring": token_ring,
        "tokens_posted": b["sampling.tokens_posted"],
        "fault": b["persistent.fault"],
        "timestamps": b["persistent.timestamps"],
        "kv_stride": kv_stride(cache),
    }


def step_trace(ops: Sequence[Op], times: NDArray[np.float64]) -> StepTrace:
    """Of the ops that the kernel runs, with their times [CTAs, ops, EVENTS] in nanoseconds."""
    return StepTrace(
        names=tuple(op.name for op in ops[: times.shape[1]]),
        begun=times[..., BEGUN],
        staged=times[..., STAGED],
        done=times[..., DONE],
        copy_begun=times[..., COPY_BEGUN],
        copy_done=times[..., COPY_DONE],
        waited=times[..., WAITED],
    )


def weight_table(geometry: ModelGeometry, weights: Mapping[str, View]) -> NDArray[np.int64]:
    """int64 [shape.table_entries]: as in `PersistentArguments`."""
    base = all_weights(weights).address

    def offset(name: str) -> int:
        units, rest = divmod(weights[name].address - base, _BYTES)
        if rest:
            raise RuntimeError(f"{name} does not begin at a multiple of {_BYTES} bytes")
        return units

    entries = [(offset("embedding"), 0)]
    for i in range(geometry.layers):
        entries.append((offset(f"layer.{i}.qkv"), offset(f"layer.{i}.attention_norm")))
        entries.append((0, 0))
        entries.append((offset(f"layer.{i}.o"), 0))
        entries.append((offset(f"layer.{i}.gate_up"), offset(f"layer.{i}.ffn_norm")))
        entries.append((offset(f"layer.{i}.down"), 0))
    entries.append((offset("embedding" if geometry.tied_embeddings else "vocabulary"), offset("final_norm")))
    vectors = [
        offset(name) if (name := f"layer.{i}.{vector}") in weights else 0
        for i in range(geometry.layers if geometry.qkv_bias or geometry.qk_norm else 0)
        for vector in ("qkv_bias", "q_norm", "k_norm")
    ]
    return np.concatenate([np.array(entries, np.int64).reshape(-1), np.array(vectors, np.int64)])


def all_weights(weights: Mapping[str, View]) -> View:
    """The memory of all weights, as one array."""
    base = min(view.address for view in weights.values())
    end = max(view.address + view.nbytes for view in weights.values())
    return View("weights", base, ((end - base) // 4,), "uint32")


def kv_stride(cache: View) -> int:
    """Elements from a layer's keys to its values, and from these to the next layer's keys."""
    return cache.shape[2] * cache.shape[3]


def watchdog_error(instead: str = "--decode graph") -> BackendError:
    """The error of a launch in which a watchdog tripped.

    Args:
        instead: what to use in place of it.
    """
    return BackendError(
        "The watchdog of the persistent decode kernel tripped: a result did not arrive in time, "
        f"and its tokens are wrong. Use {instead}, and please report it."
    )
