"""The list of ops as launches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Advance, Attention, Embed, GateUp, LmHead, Op, ProjectAdd, Qkv, Sample
from numba_atomflow.ops.cuda.gemv.kernels import AddArguments, QkvArguments, StoreArguments, SwigluArguments
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Kernel, Launch
from numba_atomflow.ops.cuda.token.advance import AdvanceArguments
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.embedding import EmbedArguments
from numba_atomflow.ops.cuda.token.rope import RopeArguments
from numba_atomflow.ops.cuda.token.sample import SampleArguments


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
                arguments = EmbedArguments(weights=op.embedding.codes, tokens=op.tokens, residual=op.residual)
                return [self._launch(f"embed_x{width}", arguments)]
            case Qkv():
                return self._bind_qkv(op)
            case Attention():
                shared = scratch("attention.partials"), scratch("attention.counters")
                inputs = op.q, op.keys, op.values, op.position
                return [self._launch(f"attention_x{self._width(op.q)}", (*inputs, *shared, op.attn_out))]
            case ProjectAdd():
                kind = op.name.rpartition(".")[2]
                added = AddArguments(weights=op.weight.codes, x=op.x, residual=op.residual)
                return [self._launch(f"{kind}_x{self._width(op.x)}", added)]
            case GateUp():
                return [self._launch(f"gate_up_x{self._width(op.y)}", SwigluArguments(**_normed(op), mlp_hidden=op.y))]
            case LmHead():
                return [self._launch(f"lm_head_x{self._width(op.logits)}", StoreArguments(**_normed(op), y=op.logits))]
            case Sample():
                return self._bind_sample(op, ranked)
            case Advance():
                advanced = AdvanceArguments(
                    token=scratch("tokens"),
                    best=scratch("sampling.best"),
                    position=op.position,
                    seen=scratch("sampling.seen"),
                    token_ring=self._ring,
                    tokens_posted=scratch("sampling.count"),
                    tokens=op.tokens,
                )
                return [self._launch("advance_sampled" if sampled else "advance", advanced)]
        raise NotImplementedError(f"the CUDA backend has no kernel for {op.name}")

    def _bind_qkv(self, op: Qkv) -> list[Launch]:
        width = self._width(op.q)
        rotation = {
            "position": op.position,
            "cosines": op.cosines,
            "sines": op.sines,
            "q": op.q,
            "keys": op.keys,
            "values": op.values,
        }
        if op.qkv is None:
            return [self._launch(f"qkv_x{width}", QkvArguments(**_normed(op), **rotation))]
        vectors = {"bias": op.bias, "q_norm": op.q_norm, "k_norm": op.k_norm}
        present = {name: vector or op.norm_weight for name, vector in vectors.items()}  # absent ones are not read
        return [
            self._launch(f"qkv_x{width}", StoreArguments(**_normed(op), y=op.qkv)),
            self._launch(f"rope_x{width}", RopeArguments(qkv=op.qkv, **present, **rotation)),
        ]

    def _bind_sample(self, op: Sample, ranked: bool) -> list[Launch]:
        common = {
            "logits": op.logits,
            "seen": self._scratch("sampling.seen"),
            "options": self._scratch("sampling.options"),
            "best": self._scratch("sampling.best"),
        }
        generator = self._scratch("sampling.generator")
        choose = self._launch("sample", SampleArguments(**common, generator=generator, token=op.token))
        return [choose] if ranked else [self._launch("argmax", ArgmaxArguments(**common)), choose]

    def _width(self, rows: View) -> int:
        return 1 if rows.shape[0] == 1 else self._kernels.block

    def _launch(self, name: str, arguments: Sequence[DeviceArray | int]) -> Launch:
        return Launch(self._loaded[name], self._kernels.planned[name].blocks, arguments, self._stream)


def _normed(op: Qkv | GateUp | LmHead) -> dict[str, View]:
    """The arguments that projections of the normed residual share."""
    return {
        "weights": op.weight.codes,
        "residual": op.residual,
        "norm_weight": op.norm_weight,
        "x_norm": op.x_norm,
    }
