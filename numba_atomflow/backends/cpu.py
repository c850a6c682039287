"""The CPU backend: every op as numba kernels over host memory, weights read straight from the mapped checkpoint.

It is the default on a machine without a GPU, and the oracle for the one with: everything but the weights is float32,
the KV cache included.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from numba_atomflow.backends.base import Observer
from numba_atomflow.errors import CheckpointError, ClosedError
from numba_atomflow.geometry import ModelGeometry, rope_inverse_frequencies
from numba_atomflow.host.machine import cpu_name
from numba_atomflow.host.threads import choose_threads, described, kernels_turn
from numba_atomflow.memory.arena import HostArena
from numba_atomflow.memory.bounds import check_indices, check_range
from numba_atomflow.memory.plan import Buffer, MemoryPlan, plan_memory
from numba_atomflow.memory.view import View, view_of
from numba_atomflow.model.step import (
    LAST_LOGITS,
    SAMPLE,
    Advance,
    Attention,
    Embed,
    GateUp,
    Head,
    LmHead,
    Op,
    ProjectAdd,
    Qkv,
    Sample,
    StepSizes,
    Weight,
    Weights,
    build_head,
    build_step,
    step_buffers,
)
from numba_atomflow.ops import attention, bandwidth, embedding, projection, rms_norm, rope
from numba_atomflow.ops.arguments import bind
from numba_atomflow.sampling import Sampler, SamplingParams
from numba_atomflow.utils.progress import Progress
from numba_atomflow.utils.stats import faster_half

BLOCK = 512  # tokens per prefill step: enough to make decoding the weights a small part of it
HEAD_ROWS = 16  # positions whose logits are computed at once when all are asked for
KEPT_STEPS = 8  # prompt lengths whose steps stay bound
FEW = 4  # up to here, reading the weights once per token is faster than decoding them into scratch for BLAS

Action = Callable[[], None]


def cpu_plan(geometry: ModelGeometry, max_seq_len: int, threads: int) -> MemoryPlan:
    """What the CPU backend allocates; the weights stay in the mapped file."""
    block = min(BLOCK, max_seq_len)
    widest = max(geometry.hidden, geometry.q_dim, geometry.ffn)
    scratch = max(projection.LARGEST_TILE * (widest + block), attention.block_scratch(geometry.head_dim))
    return plan_memory(
        [
            *step_buffers(geometry, StepSizes(max_seq_len, block, HEAD_ROWS)),
            Buffer("workspace", "block_scratch", (threads, scratch), "float32"),
            Buffer("workspace", "gate_up", (block, 2 * geometry.ffn), "float32"),
            Buffer("workspace", "scores", (geometry.heads, max_seq_len), "float32"),
        ]
    )


class CpuBackend:
    """Runs a checkpoint's ops on the CPU.

    Args:
        geometry: of the model.
        weights: the checkpoint's arrays by name, kept mapped while the backend lives.
        max_seq_len: positions of the KV cache.
        threads: that kernels run on; by default all cores, or what a CPU quota allows.
        check_weights: called after every step; raises if the arrays are not what they were.

    Raises:
        OptionError: there are not that many cores.
    """

    name = "cpu"
    decode_path = None  # there is one way only

    def __init__(
        self,
        geometry: ModelGeometry,
        weights: Mapping[str, NDArray[Any]],
        max_seq_len: int,
        threads: int | None = None,
        *,
        check_weights: Callable[[], None] = lambda: None,
    ) -> None:
        self.threads = choose_threads(threads)
        self._check_weights = check_weights
        self.device = f"{cpu_name()}, {described(self.threads, threads)}"
        self.geometry = geometry
        self.max_seq_len = max_seq_len
        self.plan = cpu_plan(geometry, max_seq_len, self.threads)
        self.prefill_chunk = min(BLOCK, max_seq_len)
        self._weight_arrays = dict(weights)  # views own nothing, and a mapping may make its arrays anew each time
        views = {
            name: view_of(name, array.view(np.int8) if array.dtype == np.uint8 else array)
            for name, array in self._weight_arrays.items()
        }
        self._weights = Weights.as_stored(views)
        self._arena = HostArena(self.plan)
        self._buffers = {buffer.name: self._arena[buffer.name] for buffer in self.plan.buffers}
        self._position = self._array("position")
        self._tokens = self._array("tokens")
        self._logits = self._array("logits")
        self._sampler = Sampler(SamplingParams(), geometry.vocabulary, ())
        self._blas: ThreadpoolController | None = None
        cosines, sines = rope.rope_table(rope_inverse_frequencies(geometry), max_seq_len)
        self._array("rope.cosines")[:] = cosines
        self._array("rope.sines")[:] = sines
        self._bound: dict[tuple[int, Head], list[Action]] = {}
        self._closed = False
        self.compile_seconds = 0.0

    def _array(self, name: str) -> NDArray[Any]:
        return self._buffers[name].host_array()

    # --- what the engine calls -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the memory: bound steps refer to the backend, and would keep it until the garbage collector comes.

        Closing twice is fine; every later use raises `ClosedError`.
        """
        self._closed = True
        self._bound.clear()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("The backend was closed; load the model again.")

    def prepare(self, progress: Progress | None = None) -> None:
        """Run one op of every kind, for one token and for a block: all that numba must compile."""
        started = time.perf_counter()
        self.seek(0)
        self._tokens[:] = 0
        numba.set_num_threads(self.threads)
        kinds: dict[tuple[type[Op], int], Op] = {}
        for tokens in (1, min(FEW + 1, self.prefill_chunk)):
            for op in self.step(tokens, LAST_LOGITS)[:-1]:  # `Advance` compiles nothing, and moves the position
                kinds.setdefault((type(op), op.writes[0].shape[0]), op)
        for done, ((kind, _), op) in enumerate(kinds.items()):
            if progress:
                progress(f"compiling {kind.__name__}", done, len(kinds))
            with kernels_turn(), self._single_threaded_blas():
                self._bind(op)()
        if progress:
            progress("compiled", len(kinds), len(kinds))
        self.compile_seconds = time.perf_counter() - started

    def step(self, tokens: int, head: Head) -> list[Op]:
        """The ops of a step over `tokens` tokens."""
        self._require_open()
        return build_step(self.geometry, self._weights, self._buffers, tokens, head)

    def seek(self, position: int) -> None:
        """Set the position at which the next token will be written."""
        self._require_open()
        check_range("position", position, 0, self.max_seq_len)
        self._position[0] = position

    def start(self, sampler: Sampler) -> None:
        """Use this sampler for the following steps."""
        self._require_open()
        self._check_weights()  # before a long prompt is computed for nothing
        self._sampler = sampler

    def prefill(self, tokens: Sequence[int], head: Head) -> None:
        """Take up to `prefill_chunk` tokens through the model at the current position, and advance it."""
        self._tokens[: len(tokens)] = tokens
        actions = self._bound_step(len(tokens), head)
        self._check_step(len(tokens))
        self._run(actions, len(tokens))

    def decode(self) -> None:
        """Take the token that was sampled last through the model, sample the next one, and advance."""
        actions = self._bound_step(1, SAMPLE)
        self._check_step(1)
        self._run(actions, 1)

    def sampled_token(self) -> int:
        """The token that was sampled last."""
        self._require_open()
        return int(self._tokens[0])

    def logits(self, start: int, stop: int, observer: Observer | None = None) -> NDArray[np.float32]:
        """Logits [stop - start, V] of these rows of the last prefill (a copy)."""
        out = np.empty((stop - start, self.geometry.vocabulary), np.float32)
        for first in range(start, stop, HEAD_ROWS):
            last = min(first + HEAD_ROWS, stop)
            head = [build_head(self.geometry, self._weights, self._buffers, first, last)]
            actions = [self._bind(op) for op in head]
            self._run(self._observed(head, actions, observer) if observer else actions, last - first)
            out[first - start : last - start] = self._logits[: last - first]
        return out

    def observe(self, tokens: Sequence[int], head: Head, observer: Observer) -> None:
        """`prefill` or `decode` with an observer: the same bound list, one op at a time."""
        self._tokens[: len(tokens)] = tokens
        actions = self._bound_step(len(tokens), head)
        check = partial(self._check_step, len(tokens))
        self._run(self._observed(self.step(len(tokens), head), actions, observer, check), len(tokens))

    def ceilings(self) -> dict[str, float]:
        """GB/s of reading memory with this backend's threads."""
        numba.set_num_threads(self.threads)
        return {"memory read": bandwidth.read_bandwidth()}

    def time_ops(self, repeats: int) -> list[tuple[Op, float]]:
        """The decode step's ops, each with its seconds in the faster half of the runs, by a clock around each."""
        ops, actions = self.step(1, SAMPLE), self._bound_step(1, SAMPLE)
        seconds = np.empty((repeats, len(ops)))

        def timed(i: int, run: int) -> None:
            started = time.perf_counter()
            actions[i]()
            seconds[run, i] = time.perf_counter() - started

        for run in range(repeats):
            self._run_in_place([partial(timed, i, run) for i in range(len(ops))])
        return list(zip(ops, faster_half(seconds).tolist(), strict=True))

    def time_step(self, repeats: int) -> float:
        """Seconds of the decode step in the faster half of the runs."""
        actions = self._bound_step(1, SAMPLE)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            self._run_in_place(actions)
            seconds.append([time.perf_counter() - started])
        return float(faster_half(seconds)[0])

    def trace_step(self, repeats: int, progress: Progress | None = None) -> None:
        """A step is many kernels here."""

    # --- how ops become kernels ----------------------------------------------------------------------------------

    def _run(self, actions: Sequence[Action], tokens: int) -> None:
        self._require_open()
        numba.set_num_threads(self.threads)  # it holds for the whole process: another engine may want another number
        try:
            with kernels_turn(), nullcontext() if tokens <= FEW else self._single_threaded_blas():
                for action in actions:
                    action()
        except CheckpointError:  # weights that have changed look like damaged ones
            self._check_weights()
            raise
        self._check_weights()

    def _run_in_place(self, actions: Sequence[Action]) -> None:
        """A decode step that leaves the position where it was."""
        position = int(self._position[0])
        self._check_step(1)
        self._run(actions, 1)
        self.seek(position)

    def _check_step(self, tokens: int) -> None:
        """Whether what a step's kernels take from memory to compute addresses with leads into the cache and weights.

        Raises:
            IndexError: it does not.
        """
        check_range("positions", int(self._position[0]), tokens, self.max_seq_len)
        check_indices("tokens", self._tokens[:tokens], self.geometry.vocabulary)

    def _observed(
        self, ops: Sequence[Op], actions: Sequence[Action], observer: Observer, check: Action | None = None
    ) -> list[Action]:
        """Every action between its op's two calls of the observer, which may change what `check` looks at."""
        memory = HostMemory()
        checks = () if check is None else (check,)
        return [
            _in_order(partial(observer.before, op, memory), *checks, action, partial(observer.after, op, memory))
            for op, action in zip(ops, actions, strict=True)
        ]

    def _single_threaded_blas(self) -> Any:
        """Kernels call BLAS from inside their parallel loops, where its own threads would only get in the way."""
        if self._blas is None:
            import scipy.linalg.cython_blas  # noqa: F401  the BLAS that compiled code calls; slow to import

            self._blas = ThreadpoolController()
        return self._blas.limit(limits=1, user_api="blas")

    def _bound_step(self, tokens: int, head: Head) -> list[Action]:
        """The kernels of a step; those used last are kept."""
        actions = self._bound.pop((tokens, head), None)
        if actions is None:
            actions = [self._bind(op) for op in self.step(tokens, head)]
            if len(self._bound) >= KEPT_STEPS:
                del self._bound[next(iter(self._bound))]  # the one not used for longest
        self._bound[tokens, head] = actions
        return actions

    def _bind(self, op: Op) -> Action:
        """The kernels of an op, with their arguments in place."""
        match op:
            case Embed():
                codes, scales = _stored(op.embedding)
                return bind(embedding.embed, op.tokens.host_array(), codes, scales, op.residual.host_array())
            case Qkv():
                return self._bind_qkv(op)
            case Attention():
                return self._bind_attention(op)
            case ProjectAdd():
                return self._project(op.weight, op.x, op.residual, accumulate=True)
            case GateUp():
                return self._bind_gate_up(op)
            case LmHead():
                project = self._project(op.weight, op.x_norm, op.logits, accumulate=False)
                return _in_order(self._norm(op.residual, op.norm_weight, op.x_norm), project)
            case Sample():
                return partial(self._sample, op.logits.host_array()[0], op.token.host_array())
            case Advance():
                return partial(self._advance, op.tokens)
        raise NotImplementedError(f"the CPU backend has no kernel for {op.name}")

    def _bind_qkv(self, op: Qkv) -> Action:
        assert op.qkv is not None  # `cpu_plan` keeps it  # noqa: S101
        rotate = bind(
            rope.rope_and_store,
            op.qkv.host_array(),
            op.position.host_array(),
            op.cosines.host_array(),
            op.sines.host_array(),
            op.q.host_array(),
            op.keys.host_array(),
            op.values.host_array(),
        )
        steps = [self._norm(op.residual, op.norm_weight, op.x_norm)]
        if op.bias is not None:  # the projection is added to it
            steps.append(partial(np.copyto, op.qkv.host_array(), op.bias.host_array()))
        steps.append(self._project(op.weight, op.x_norm, op.qkv, accumulate=op.bias is not None))
        if op.q_norm is not None and op.k_norm is not None:
            steps.append(self._norm_heads(op.qkv, op.q_norm, op.k_norm))
        return _in_order(*steps, rotate)

    def _bind_attention(self, op: Attention) -> Action:
        q, out = op.q.host_array(), op.attn_out.host_array()
        keys, values, position = op.keys.host_array(), op.values.host_array(), op.position.host_array()
        head_dim = self.geometry.head_dim
        if len(q) == 1:
            scores = self._array("scores")
            return bind(attention.attend_token, q[0], keys, values, position, head_dim, scores, out[0])
        scratch = self._array("block_scratch")
        return bind(attention.attend_block, q, keys, values, position, head_dim, scratch, out)

    def _bind_gate_up(self, op: GateUp) -> Action:
        normed, y = op.x_norm.host_array(), op.y.host_array()
        codes, scales = _stored(op.weight)
        norm = self._norm(op.residual, op.norm_weight, op.x_norm)
        if len(y) <= FEW:
            rows = [bind(projection.project_token_swiglu, codes, scales, normed[t], y[t]) for t in range(len(y))]
            return _in_order(norm, *rows)
        gate_up = self._buffers["gate_up"].rows(0, len(y))
        project = self._project(op.weight, op.x_norm, gate_up, accumulate=False)
        return _in_order(norm, project, bind(projection.swiglu, gate_up.host_array(), y))

    def _project(self, weight: Weight, x: View, y: View, *, accumulate: bool) -> Action:
        inputs, outputs = x.host_array(), y.host_array()
        codes, scales = _stored(weight)
        if len(inputs) <= FEW:
            return _in_order(
                *(
                    bind(projection.project_token, codes, scales, inputs[t], outputs[t], accumulate)
                    for t in range(len(inputs))
                )
            )
        scratch = self._array("block_scratch")
        return bind(projection.project_block, codes, scales, inputs, outputs, accumulate, scratch)

    def _norm(self, x: View, weight: View, y: View) -> Action:
        eps = np.float32(self.geometry.norm_eps)
        return bind(rms_norm.rms_norm, x.host_array(), weight.host_array(), eps, y.host_array())

    def _norm_heads(self, qkv: View, q_norm: View, k_norm: View) -> Action:
        g = self.geometry
        arrays = qkv.host_array(), q_norm.host_array(), k_norm.host_array()
        return bind(rms_norm.rms_norm_heads, *arrays, g.q_dim, g.kv_dim, np.float32(g.norm_eps))

    def _sample(self, logits: NDArray[np.float32], token: NDArray[np.int32]) -> None:
        token[0] = self._sampler.choose(logits)

    def _advance(self, tokens: int) -> None:
        self._position[0] += tokens


class HostMemory:
    """Views in host memory, as observers see them."""

    def read(self, view: View) -> NDArray[Any]:
        """What the view holds now (a copy)."""
        return view.host_array().copy()

    def write(self, view: View, values: NDArray[Any]) -> None:
        """Put `values` into the view."""
        view.host_array()[:] = values


def _stored(weight: Weight) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Codes [N, K] and scales [N, groups] as the checkpoint has them; of a float16 weight the bits, and None."""
    codes = weight.codes.host_array()
    if weight.scales is None:
        return codes.view(np.int16), None  # numba has no float16 on a CPU
    return codes, weight.scales.host_array()


def _in_order(*actions: Action) -> Action:
    if len(actions) == 1:
        return actions[0]

    def run() -> None:
        for action in actions:
            action()

    return run
