"""Steps of several GPUs op by op, under an observer that reads and changes what the ops read and write.

An op is a launch of the persistent kernel on every rank, as on one GPU. Before it, each rank publishes what it has of
the op's input to the mailboxes of those that read it. All ranks have ended before anything is read, changed or
published: a slower one would overwrite what an observer has written.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.backends.base import Observer
from numba_atomflow.backends.cuda.queue import StepQueue
from numba_atomflow.backends.cuda.tensor_parallel.rank import Rank
from numba_atomflow.backends.cuda.tensor_parallel.steps import RankSteps
from numba_atomflow.backends.cuda.tensor_parallel.views import ModelMemory, ModelViews
from numba_atomflow.errors import BackendError
from numba_atomflow.model.step import SAMPLE, Advance, Embed, Head, LmHead, Op, Sample
from numba_atomflow.ops.cuda.persistent.rank import PROMPT, SAMPLED
from numba_atomflow.ops.cuda.persistent.schedule import PersistentShape


class ObservedSteps:
    """Runs ops by themselves on all ranks.

    Args:
        views: of the whole model; what observers see.
    """

    def __init__(self, steps: RankSteps, queue: StepQueue, views: ModelViews) -> None:
        self._steps, self._queue, self._views = steps, queue, views
        self._memory = ModelMemory(views, steps.ranks)
        self._ready = False

    def run(self, token: int, head: Head, observer: Observer) -> None:
        """Run a step of this token op by op; the queue counts it.

        Raises:
            BackendError: a watchdog tripped, or a kernel could not be compiled.
        """
        self._prepare()
        self._steps.send([token])
        with self._queue.launching(1, head):
            for index, op in enumerate(self._views.step(1, head)):
                observer.before(op, self._memory)
                self._run_op(op, index, head)
                observer.after(op, self._memory)
            self._queue.check_watchdog()

    def logits(self, observer: Observer) -> NDArray[np.float32]:
        """Logits [1, V] of the last step's residual stream, which the observer may replace before."""
        self._prepare()
        *_, op = (op for op in self._views.step(1, SAMPLE) if isinstance(op, LmHead))
        observer.before(op, self._memory)
        try:
            self._on_all(lambda rank: rank.publish(self._layers, steps_back=1))
            self._steps.run_head()
        except BackendError:
            self._queue.distrust()
            raise
        observer.after(op, self._memory)
        logits: NDArray[np.float32] = self._memory.read(op.logits)
        return logits

    def _run_op(self, op: Op, index: int, head: Head) -> None:
        match op:
            case Embed():
                self._on_all(lambda rank: rank.run_op(0))
                self._spread(op)
            case Sample():
                self._on_all(lambda rank: rank.end_step(SAMPLED))
                self._on_all(lambda rank: rank.choose_token(logprobs=self._steps.logprobs))
            case Advance():
                self._on_all(Rank.post_token if head.sample else lambda rank: rank.end_step(PROMPT))
            case _:
                layer = self._shape.op_index.layer(index)
                self._on_all(lambda rank: rank.publish(layer))
                self._on_all(lambda rank: rank.run_op(index))

    def _spread(self, op: Embed) -> None:
        """The token's row of the embedding, which one rank has: into the residual stream of all."""
        ranks = self._steps.ranks
        token = int(self._memory.read(op.tokens)[0])
        owner = ranks[token // ranks[0].kernels.sharding.vocabulary_rows]
        with owner.owner.current():
            row = owner.memory.read(owner.buffers["residual"].rows(0, 1))
        self._memory.write(op.residual, row)

    def _on_all(self, launch: Callable[[Rank], None]) -> None:
        self._steps.on_all(launch)
        self._steps.wait()

    def _prepare(self) -> None:
        """Load, on first use, the kernels that only observed steps need; nothing may run meanwhile."""
        if self._ready:
            return
        self._steps.wait()
        self._steps.on_all(Rank.bind_ops)
        self._ready = True

    @property
    def _shape(self) -> PersistentShape:
        return self._steps.ranks[0].kernels.persistent_shape

    @property
    def _layers(self) -> int:
        return self._shape.layers
