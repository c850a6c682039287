"""The list of ops as launches."""

from typing import TYPE_CHECKING

from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.qkv_views import rotation_views, vector_views
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Advance, Attention, Embed, GateUp, LmHead, Op, ProjectAdd, Qkv, Sample
from numba_atomflow.ops.cuda.attention.decode import AttentionArguments
from numba_atomflow.ops.cuda.gemv.kernels import (
    AddArguments,
    ProjectArguments,
    QkvArguments,
    StoreArguments,
    SwigluArguments,
)
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.advance import AdvanceArguments
from numba_atomflow.ops.cuda.token.argmax import ArgmaxArguments
from numba_atomflow.ops.cuda.token.embedding import EmbedArguments
from numba_atomflow.ops.cuda.token.family import AddNormArguments, CapLogitsArguments
from numba_atomflow.ops.cuda.token.logprobs import LogprobsArguments
from numba_atomflow.ops.cuda.token.rope import RopeArguments
from numba_atomflow.ops.cuda.token.sample import SampleArguments

if TYPE_CHECKING:
    from numba_atomflow.backends.cuda.bind_prefill import PrefillBinder


class Binder:
    """Turns ops into launches of a model's kernels.

    Args:
        loaded: kernels by name.
        ring, logprob_ring: the host's, to which sampled tokens and what is said of them are posted.
    """

    def __init__(self, model: DeviceModel, loaded: LoadedKernels, ring: View, logprob_ring: View) -> None:
        self._model, self._kernels, self._loaded = model, model.kernels, loaded
        self._ring, self._logprob_ring = ring, logprob_ring
        self._prefill = _prefill_binder(model, loaded)

    def bind(self, op: Op, *, sampled: bool = False, argmax_done: bool = False, logprobs: bool = False) -> list[Launch]:
        """The launches of an op.

        Args:
            sampled: the step samples a token, which its last op posts to the host ring.
            argmax_done: the arg-max of the logits is there already.
            logprobs: of the sampled token go to their ring.

        Raises:
            NotImplementedError: there is no kernel for the op.
        """
        if self._prefill is not None and self._kernels.on_gemm_path(_tokens(op)):
            return self._prefill.bind(op) + (self._cap_logits(op) if isinstance(op, LmHead) else [])
        match op:
            case Embed():
                arguments = EmbedArguments(weights=op.embedding.codes, tokens=op.tokens, residual=op.residual)
                return [self._launch(self._name("embed", op.residual), arguments)]
            case Qkv():
                return self._bind_qkv(op)
            case Attention():
                partials, counters = self._model.attention
                attention = AttentionArguments(
                    q=op.q,
                    keys=op.keys,
                    values=op.values,
                    position=op.position,
                    partials=partials,
                    counters=counters,
                    out=op.attn_out,
                )
                kind = "attention" if op.window is None or self._kernels.window is None else "window_attention"
                return [self._launch(self._name(kind, op.q), attention)]
            case ProjectAdd():
                return self._bind_add(op)
            case GateUp():
                return [
                    self._launch(self._name("gate_up", op.y), SwigluArguments(**_norm_inputs(op), intermediate=op.y))
                ]
            case LmHead():
                stored = StoreArguments(**_norm_inputs(op), y=op.logits)
                return [self._launch(self._name("lm_head", op.logits), stored), *self._cap_logits(op)]
            case Sample():
                return self._bind_sample(op, argmax_done=argmax_done, logprobs=logprobs)
            case Advance():
                return [self._bind_advance(op, sampled=sampled)]
        raise NotImplementedError(f"the CUDA backend has no kernel for {op.name}")

    def _bind_qkv(self, op: Qkv) -> list[Launch]:
        rotation = rotation_views(op)
        name = self._name("qkv", op.q)
        if op.qkv is None:
            return [self._launch(name, QkvArguments(**_norm_inputs(op), **rotation))]
        return [
            self._launch(name, StoreArguments(**_norm_inputs(op), y=op.qkv)),
            self._launch(self._name("rope", op.q), RopeArguments(qkv=op.qkv, **vector_views(op), **rotation)),
        ]

    def _bind_add(self, op: ProjectAdd) -> list[Launch]:
        name = self._name(op.kind, op.x)
        if op.norm_weight is None or op.projected is None:
            return [self._launch(name, AddArguments(weights=op.weight.codes, x=op.x, residual=op.residual))]
        added = AddNormArguments(x=op.projected, norm_weight=op.norm_weight, residual=op.residual)
        return [
            self._launch(name, ProjectArguments(weights=op.weight.codes, x=op.x, y=op.projected)),
            self._launch(self._name("add_norm", op.x), added),
        ]

    def _cap_logits(self, op: LmHead) -> list[Launch]:
        if op.soft_cap is None:
            return []
        rows, width = op.logits.shape
        return [self._launch("cap_logits", CapLogitsArguments(logits=op.logits, count=rows * width))]

    def _bind_sample(self, op: Sample, *, argmax_done: bool, logprobs: bool) -> list[Launch]:
        if op.logits.shape[0] != 1:
            raise NotImplementedError("the CUDA backend samples from one row of logits per step")
        state = self._model.sampling
        common = {"logits": op.logits, "seen": state.seen, "options": state.options, "best": state.best}
        launches = [] if argmax_done else [self._launch("argmax", ArgmaxArguments(**common))]
        sample = SampleArguments(**common, generator=state.generator, sums=state.sums, token=op.token)
        launches.append(self._launch("sample", sample))
        if logprobs:
            record = LogprobsArguments(op.logits, op.token, state.tokens_posted, self._logprob_ring)
            launches.append(self._launch("logprobs", record))
        return launches

    def _bind_advance(self, op: Advance, *, sampled: bool) -> Launch:
        state = self._model.sampling
        arguments = AdvanceArguments(
            token=self._model.buffers["tokens"],
            best=state.best,
            position=op.position,
            seen=state.seen,
            token_ring=self._ring,
            tokens_posted=state.tokens_posted,
            tokens=op.tokens,
        )
        return self._launch("advance_sampled" if sampled else "advance", arguments)

    def _name(self, kind: str, rows: View) -> str:
        """The kernel for this many tokens."""
        return f"{kind}_x{self._kernels.width_for(rows.shape[0])}"

    def _launch(self, name: str, arguments: tuple[DeviceArray | int, ...]) -> Launch:
        return Launch(self._loaded[name], self._kernels.planned[name].ctas, arguments, self._model.stream)


def _prefill_binder(model: DeviceModel, loaded: LoadedKernels) -> "PrefillBinder | None":
    """What binds ops over many tokens; None without the GEMM path."""
    if model.kernels.prefill is None:
        return None
    from numba_atomflow.backends.cuda.bind_prefill import PrefillBinder

    return PrefillBinder(model, model.kernels.prefill, loaded)


def _tokens(op: Op) -> int:
    """Tokens of an op of the embedding, the layers or the LM head; 1 for those that come after."""
    match op:
        case Attention():
            return op.q.shape[0]
        case Embed() | Qkv() | ProjectAdd() | GateUp() | LmHead():
            return op.residual.shape[0]
    return 1


def _norm_inputs(op: Qkv | GateUp | LmHead) -> dict[str, View]:
    """The arguments that projections of the stream share. Kernels of a model without norms before projections do not
    read `norm_weight`, and any other vector stands in for it.
    """
    return {
        "weights": op.weight.codes,
        "residual": op.residual,
        "norm_weight": op.norm_weight or op.residual,
        "x_norm": op.x_norm,
    }
