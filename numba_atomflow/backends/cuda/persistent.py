"""The persistent kernel bound to a model's memory: the whole decode step, or some of its ops, as a launch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.errors import BackendError
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
from numba_atomflow.ops.cuda.runtime.launch import Kernel, Launch

_BYTES = 4 * TABLE_UNIT  # that the table of weights counts in


def persistent_buffers(shape: PersistentShape) -> list[Buffer]:
    """What the kernel needs beside what every decode step has."""
    events = shape.sms * shape.ops * EVENTS
    return [
        Buffer("workspace", "persistent.mailbox", (shape.mailbox.end,), "uint64"),
        Buffer("workspace", "persistent.table", (2 * shape.ops,), "int64"),
        Buffer("workspace", "persistent.steps", (2,), "int64"),
        Buffer("workspace", "persistent.fault", (1,), "int32"),
        Buffer("workspace", "persistent.timestamps", (events,), "int64"),
    ]


class PersistentStep:
    """Launches of the persistent kernel.

    Args:
        loaded: kernels by name. buffers: all views that are no weights, by name. weights: views of the weights by name.
        ring: where the host finds tokens.
    """

    def __init__(
        self,
        kernels: ModelKernels,
        loaded: Mapping[str, Kernel],
        buffers: Mapping[str, View],
        weights: Mapping[str, View],
        ring: View,
        stream: Any,
    ) -> None:
        self._kernels, self._loaded, self._stream = kernels, loaded, stream
        self._buffers, self._weights, self._ring = buffers, weights, ring
        self.shape = kernels.persistent_shape
        self._base = min(view.address for view in weights.values())

    def table(self) -> NDArray[np.int64]:
        """For each op where its weights and its norm begin."""
        g, entries = self._kernels.geometry, []
        entries.append(self._entry("embedding", None))
        for i in range(g.layers):
            entries.append(self._entry(f"layer.{i}.qkv", f"layer.{i}.attention_norm"))
            entries.append((0, 0))
            entries.append(self._entry(f"layer.{i}.o", None))
            entries.append(self._entry(f"layer.{i}.gate_up", f"layer.{i}.ffn_norm"))
            entries.append(self._entry(f"layer.{i}.down", None))
        entries.append(self._entry("embedding" if g.tied_embeddings else "vocabulary", "final_norm"))
        return np.array(entries, np.int64).reshape(-1)

    def _entry(self, weight: str, norm: str | None) -> tuple[int, int]:
        return self._place(weight), 0 if norm is None else self._place(norm)

    def _place(self, name: str) -> int:
        place, rest = divmod(self._weights[name].address - self._base, _BYTES)
        if rest:
            raise RuntimeError(f"{name} does not begin at a multiple of {_BYTES} bytes")
        return place

    def launch(self, first: int, last: int, *, choose: bool = False, traced: Kernel | None = None) -> Launch:
        """Ops first .. last - 1 of the step, counted as in `decode.build_step`; by the kernel `traced`, if given.
        choose: the most likely token is the next one, and the step ends with this launch.
        """
        b = self._buffers
        end = max(view.address + view.nbytes for view in self._weights.values())
        weights = View("weights", self._base, ((end - self._base) // 4,), "uint32")
        cache = b[KV_CACHE]
        arguments = PersistentArguments(
            weights=weights,
            table=b["persistent.table"],
            cache16=cache,
            cache=cache,
            mailbox=b["persistent.mailbox"],
            tokens=b["tokens"],
            position=b["position"],
            steps=b["persistent.steps"],
            cosines=b["rope.cosines"],
            sines=b["rope.sines"],
            residual=b["residual"],
            x_norm=b["x_norm"],
            final_x_norm=b["final_x_norm"],
            q=b["q"],
            attn_out=b["attn_out"],
            intermediate=b["intermediate"],
            logits=b["logits"],
            seen=b["sampling.seen"],
            options=b["sampling.options"],
            best=b["sampling.best"],
            token_ring=self._ring,
            tokens_posted=b["sampling.tokens_posted"],
            fault=b["persistent.fault"],
            timestamps=b["persistent.timestamps"],
            plane=self._plane,
            first_op=first,
            end_op=last,
            greedy=int(choose),
        )
        kernel = traced or self._loaded["persistent"]
        return Launch(kernel, self.shape.sms, arguments, self._stream)

    def publish(self, layer: int) -> Launch:
        """What lets an op of this layer run by itself; the vocabulary's is behind the last."""
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
            plane=self._plane,
            layer=layer,
        )
        return Launch(self._loaded["publish"], planned.ctas, arguments, self._stream)

    def trace(self, ops: Sequence[Op], times: NDArray[np.int64]) -> StepTrace:
        """What a traced launch of a whole step has left in `persistent.timestamps`, int64 [blocks * ops * EVENTS]."""
        made = self.shape.ops
        found = to_nanoseconds(times.reshape(self.shape.sms, made, EVENTS))
        return StepTrace(
            names=tuple(op.name for op in ops[:made]),
            begun=found[..., BEGUN],
            staged=found[..., STAGED],
            done=found[..., DONE],
            copy_begun=found[..., COPY_BEGUN],
            copy_done=found[..., COPY_DONE],
            waited=found[..., WAITED],
        )

    def begin_anew(self, memory: DeviceMemory) -> None:
        """After a step that may have been left halfway, or have failed: the next one uses epochs of its own."""
        steps = int(memory.read(self._buffers["persistent.steps"])[0])
        memory.write(self._buffers["persistent.steps"], np.array([steps + 1, 0]))
        memory.write(self._buffers["persistent.fault"], np.zeros(1, np.int32))

    @property
    def _plane(self) -> int:
        """Elements of a layer's keys."""
        cache = self._buffers[KV_CACHE]
        return cache.nbytes // 2 // (2 * self._kernels.geometry.layers)

    def op_launches(self, index: int) -> list[Launch]:
        """One op by itself, reading what the views hold."""
        layer = self.shape.op_index.layer(index)
        return [self.publish(layer), self.launch(index, index + 1)]


def fault_sentence() -> BackendError:
    """What a launch means whose blocks stopped waiting for each other."""
    return BackendError(
        "The persistent decode kernel waited too long for a result of its own and gave up; "
        "its tokens are wrong. Use --decode graph, and please report it."
    )
