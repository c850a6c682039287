"""The list of ops as launches."""

from collections.abc import Callable, Mapping
from typing import Any

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Advance, Attention, Embed, GateUp, LmHead, Op, ProjectAdd, Qkv, Sample
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Kernel, Launch


class Binder:
    """Turns ops into launches of a model's kernels.

    Args:
        loaded: kernels by name. scratch: the workspace's views, by name. ring: where the host finds tokens.
    """

    def __init__(
        self,
        kernels: ModelKernels,
        loaded: Mapping[str, Kernel],
        scratch: Callable[[str], View],
        ring: View,
        stream: Any,
    ) -> None:
        self._kernels, self._loaded, self._scratch = kernels, loaded, scratch
        self._ring, self._stream = ring, stream

    def bind(self, op: Op, *, sampled: bool, ranked: bool = False) -> list[Launch]:
        """The launches of an op. `sampled`: the step chooses a token, which its last op hands to the host.
        `ranked`: the largest logit is known already.
        """
        scratch = self._scratch
        match op:
            case Embed():
                width = self._width(op.residual)
                return [self._launch(f"embed_x{width}", op.embedding.codes, op.tokens, op.residual)]
            case Qkv():
                return self._bind_qkv(op)
            case Attention():
                shared = scratch("attention.partials"), scratch("attention.counters")
                inputs = op.q, op.keys, op.values, op.position
                return [self._launch(f"attention_x{self._width(op.q)}", *inputs, *shared, op.attn_out)]
            case ProjectAdd():
                kind = op.name.rpartition(".")[2]
                return [self._launch(f"{kind}_x{self._width(op.x)}", op.weight.codes, op.x, op.residual)]
            case GateUp():
                normed = op.weight.codes, op.residual, op.norm_weight, op.x_norm
                return [self._launch(f"gate_up_x{self._width(op.y)}", *normed, op.y)]
            case LmHead():
                normed = op.weight.codes, op.residual, op.norm_weight, op.x_norm
                return [self._launch(f"lm_head_x{self._width(op.logits)}", *normed, op.logits)]
            case Sample():
                seen, options = scratch("sampling.seen"), scratch("sampling.options")
                generator, best = scratch("sampling.generator"), scratch("sampling.best")
                choose = self._launch("sample", op.logits, seen, options, generator, best, op.token)
                return [choose] if ranked else [self._launch("argmax", op.logits, seen, options, best), choose]
            case Advance():
                best, seen, count = (scratch(f"sampling.{name}") for name in ("best", "seen", "count"))
                name, token = "advance_sampled" if sampled else "advance", scratch("tokens")
                return [self._launch(name, token, best, op.position, seen, self._ring, count, op.tokens)]
        raise NotImplementedError(f"the CUDA backend has no kernel for {op.name}")

    def _bind_qkv(self, op: Qkv) -> list[Launch]:
        width = self._width(op.q)
        normed = op.weight.codes, op.residual, op.norm_weight, op.x_norm
        rotation = op.position, op.cosines, op.sines, op.q, op.keys, op.values
        if op.qkv is None:
            return [self._launch(f"qkv_x{width}", *normed, *rotation)]
        vectors = (vector or op.norm_weight for vector in (op.bias, op.q_norm, op.k_norm))  # the norm stands for none
        return [
            self._launch(f"qkv_x{width}", *normed, op.qkv),
            self._launch(f"rope_x{width}", op.qkv, *vectors, *rotation),
        ]

    def _width(self, rows: View) -> int:
        return 1 if rows.shape[0] == 1 else self._kernels.block

    def _launch(self, name: str, *arguments: DeviceArray | int) -> Launch:
        return Launch(self._loaded[name], self._kernels.planned[name].blocks, arguments, self._stream)
