"""The list of ops as calls of numba kernels with bound arguments."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.logprobs import TokenLogprobs, token_logprobs
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import (
    Advance,
    Attention,
    Embed,
    GateUp,
    LmHead,
    Op,
    ProjectAdd,
    Qkv,
    Sample,
    Weight,
)
from numba_atomflow.ops import attention, elementwise, embedding, projection, rms_norm, rope
from numba_atomflow.ops.arguments import bind
from numba_atomflow.sampling import Sampler

Action = Callable[[], None]


class CpuBinder:
    """Turns ops into actions: kernels bound to their arguments.

    Args:
        buffers: every view but the weights, by name.
        sampler: of the first generation; assign another for the next.

    Attributes:
        logprobs: of the tokens that the last step has sampled, if the sampler's parameters request them.
    """

    def __init__(self, geometry: ModelGeometry, buffers: Mapping[str, View], sampler: Sampler) -> None:
        self.geometry, self._buffers, self.sampler = geometry, buffers, sampler
        self.logprobs: tuple[TokenLogprobs, ...] = ()

    def _array(self, name: str) -> NDArray[Any]:
        return self._buffers[name].host_array()

    def bind(self, op: Op) -> Action:
        """The kernels of an op, with bound arguments."""
        match op:
            case Embed():
                codes, scales = _stored(op.embedding)
                return bind(embedding.embed, op.tokens.host_array(), codes, scales, op.residual.host_array())
            case Qkv():
                return self._bind_qkv(op)
            case Attention():
                return self._bind_attention(op)
            case ProjectAdd():
                return self._bind_project_add(op)
            case GateUp():
                return self._bind_gate_up(op)
            case LmHead():
                project = self._project(op.weight, op.x_norm, op.logits, accumulate=False)
                return in_order(*self._norm(op.residual, op.norm_weight, op.x_norm), project, *self._cap_logits(op))
            case Sample():
                return self._bind_sample(op)
            case Advance():
                return partial(self._advance, op.position.host_array(), op.tokens)
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
        steps = self._norm(op.residual, op.norm_weight, op.x_norm)
        if op.bias is not None:  # the projection is added to it
            steps.append(partial(np.copyto, op.qkv.host_array(), op.bias.host_array()))
        steps.append(self._project(op.weight, op.x_norm, op.qkv, accumulate=op.bias is not None))
        if op.q_norm is not None and op.k_norm is not None:
            steps.append(self._norm_heads(op.qkv, op.q_norm, op.k_norm))
        return in_order(*steps, rotate)

    def _bind_attention(self, op: Attention) -> Action:
        q, out = op.q.host_array(), op.attn_out.host_array()
        keys, values, position = op.keys.host_array(), op.values.host_array(), op.position.host_array()
        soft_cap = attention.NO_CAP if op.soft_cap is None else np.float32(op.soft_cap)
        common = q, keys, values, position, self.geometry.head_dim, op.window or attention.NO_WINDOW, soft_cap
        if len(q) <= projection.GEMV_TOKENS:
            return bind(attention.attend_tokens, *common, self._array("scores"), out)
        return bind(attention.attend_chunk, *common, self._array("prefill_scratch"), out)

    def _bind_project_add(self, op: ProjectAdd) -> Action:
        if op.norm_weight is None or op.projected is None:
            return self._project(op.weight, op.x, op.residual, accumulate=True)
        eps = np.float32(self.geometry.norm_eps)
        arrays = op.projected.host_array(), op.norm_weight.host_array(), eps, op.residual.host_array()
        project = self._project(op.weight, op.x, op.projected, accumulate=False)
        return in_order(project, bind(rms_norm.add_rms_norm, *arrays))

    def _bind_gate_up(self, op: GateUp) -> Action:
        x_norm, y = op.x_norm.host_array(), op.y.host_array()
        codes, scales = _stored(op.weight)
        norm = self._norm(op.residual, op.norm_weight, op.x_norm)
        if op.gate_up is not None:
            project = self._project(op.weight, op.x_norm, op.gate_up, accumulate=False)
            return in_order(*norm, project, bind(elementwise.geglu, op.gate_up.host_array(), y))
        if len(y) <= projection.GEMV_TOKENS:
            kernel = projection.project_token_swiglu if len(y) == 1 else projection.project_tokens_swiglu
            return in_order(*norm, bind(kernel, codes, scales, x_norm, y))
        scratch = self._array("prefill_scratch")
        return in_order(*norm, bind(projection.project_chunk_swiglu, codes, scales, x_norm, y, scratch))

    def _project(self, weight: Weight, x: View, y: View, *, accumulate: bool) -> Action:
        inputs, outputs = x.host_array(), y.host_array()
        codes, scales = _stored(weight)
        if len(inputs) <= projection.GEMV_TOKENS:
            kernel = projection.project_token if len(inputs) == 1 else projection.project_tokens
            return bind(kernel, codes, scales, inputs, outputs, accumulate)
        scratch = self._array("prefill_scratch")
        return bind(projection.project_chunk, codes, scales, inputs, outputs, accumulate, scratch)

    def _norm(self, x: View, weight: View | None, y: View) -> list[Action]:
        """The norm before a projection; none in a model without."""
        if weight is None:
            return []
        eps = np.float32(self.geometry.norm_eps)
        return [bind(rms_norm.rms_norm, x.host_array(), weight.host_array(), eps, y.host_array())]

    @staticmethod
    def _cap_logits(op: LmHead) -> list[Action]:
        if op.soft_cap is None:
            return []
        return [bind(elementwise.soft_cap, op.logits.host_array(), np.float32(op.soft_cap))]

    def _norm_heads(self, qkv: View, q_norm: View, k_norm: View) -> Action:
        g = self.geometry
        arrays = qkv.host_array(), q_norm.host_array(), k_norm.host_array()
        return bind(rms_norm.rms_norm_heads, *arrays, g.q_dim, g.kv_dim, np.float32(g.norm_eps))

    def _bind_sample(self, op: Sample) -> Action:
        if op.logits.shape[0] != 1:
            raise NotImplementedError("the CPU backend samples from one row of logits per step")
        logits, token = op.logits.host_array()[0], op.token.host_array()

        def sample() -> None:
            token[0] = self.sampler.choose(logits)
            top = self.sampler.params.logprobs
            self.logprobs = () if top is None else (token_logprobs(logits, int(token[0]), top),)

        return sample

    @staticmethod
    def _advance(position: NDArray[np.int64], tokens: int) -> None:
        position[0] += tokens


def _stored(weight: Weight) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Codes [N, K] and scales [N, groups] as the checkpoint has them; of a float16 weight the bits, and None."""
    codes = weight.codes.host_array()
    if weight.scales is None:
        return codes.view(np.int16), None  # numba has no float16 on a CPU
    return codes, weight.scales.host_array()


def in_order(*actions: Action) -> Action:
    """One action that runs these, one after the other."""
    if len(actions) == 1:
        return actions[0]

    def run() -> None:
        for action in actions:
            action()

    return run
