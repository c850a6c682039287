"""The ops of a prefill step on the GEMM path as launches."""

from typing import Any

from numba_atomflow.backends.cuda.model import DeviceModel
from numba_atomflow.backends.cuda.plan import PrefillScratch
from numba_atomflow.backends.cuda.qkv_views import rotation_views, vector_views
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Attention, Embed, GateUp, LmHead, Op, ProjectAdd, Qkv
from numba_atomflow.ops.cuda.attention.prefill import PrefillAttentionArguments
from numba_atomflow.ops.cuda.gemm.arguments import (
    GemmAddArguments,
    GemmQkvArguments,
    GemmStoreArguments,
    GemmSwigluArguments,
)
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for
from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels
from numba_atomflow.ops.cuda.runtime.launch import DeviceArray, Launch
from numba_atomflow.ops.cuda.runtime.loaded import LoadedKernels
from numba_atomflow.ops.cuda.token.embedding import EmbedChunkArguments
from numba_atomflow.ops.cuda.token.family import AddNormArguments, GegluTilesArguments, RoundTilesArguments
from numba_atomflow.ops.cuda.token.quantize_tiles import QuantizeTilesArguments
from numba_atomflow.ops.cuda.token.rms_norm import RmsNormTilesArguments
from numba_atomflow.ops.cuda.token.rope import RopeChunkArguments


class PrefillBinder:
    """Turns ops over many tokens into launches of a model's GEMM kernels. The tokens are padded to a bucket: kernels
    read and write rows of padding, too, which buffers have room for.
    """

    def __init__(self, model: DeviceModel, kernels: PrefillKernels, loaded: LoadedKernels) -> None:
        self._model, self._kernels, self._loaded = model, kernels, loaded
        self._count = model.buffers["count"]
        self._scratch = PrefillScratch.of(model.buffers)

    def bind(self, op: Op) -> list[Launch]:
        """The launches of an op of the embedding or the layers, or of the LM head.

        Raises:
            NotImplementedError: there is no kernel for the op.
        """
        match op:
            case Embed():
                arguments = EmbedChunkArguments(
                    weights=op.embedding.codes, tokens=op.tokens, count=self._count, residual=op.residual
                )
                return [self._launch("embed", op.residual, arguments)]
            case Qkv():
                return [self._input(op), *self._bind_qkv(op)]
            case Attention():
                attention = PrefillAttentionArguments(
                    q=op.q,
                    keys=op.keys,
                    values=op.values,
                    position=op.position,
                    count=self._count,
                    partials=self._scratch.partials,
                    counters=self._scratch.counters,
                    out=op.attn_out,
                )
                windowed = op.window is not None and self._model.kernels.window is not None
                return [self._launch("window_attention" if windowed else "attention", op.q, attention)]
            case ProjectAdd():
                return self._bind_add(op)
            case GateUp():
                return [self._input(op), *self._bind_gate_up(op)]
            case LmHead():
                stored = GemmStoreArguments(**self._gemm(op, op.x_norm), y=op.logits)
                return [self._norm("final_norm", op), self._launch("lm_head", op.residual, stored)]
        raise NotImplementedError(f"the GEMM path has no kernel for {op.name}")

    def _bind_add(self, op: ProjectAdd) -> list[Launch]:
        if op.norm_weight is not None and op.projected is not None:
            projected = GemmStoreArguments(**self._gemm(op, op.x), y=op.projected)
            normed = AddNormArguments(x=op.projected, norm_weight=op.norm_weight, residual=op.residual)
            return [self._launch(op.kind, op.residual, projected), self._launch("add_norm", op.residual, normed)]
        if op.kind not in self._kernels.quantized:
            added = GemmAddArguments(**self._gemm(op, op.x), residual=op.residual)
            return [self._launch(op.kind, op.residual, added)]
        codes = self._model.buffers[f"tiles.{self._kernels.input_of(op.kind)}"]
        quantized = QuantizeTilesArguments(x=op.x, y=codes, tokens=bucket_for(op.x.shape[0]))
        added = GemmAddArguments(**self._gemm(op, codes), residual=op.residual)
        quantize = self._launch(f"quantize_{op.kind}", op.residual, quantized)
        return [quantize, self._launch(op.kind, op.residual, added)]

    def _bind_qkv(self, op: Qkv) -> list[Launch]:
        rotation = rotation_views(op) | {"count": self._count}
        inputs = self._gemm(op, self._tiles(op))
        if op.qkv is None:
            return [self._launch("qkv", op.residual, GemmQkvArguments(**inputs, **rotation))]
        return [
            self._launch("qkv", op.residual, GemmStoreArguments(**inputs, y=op.qkv)),
            self._launch("rope", op.residual, RopeChunkArguments(qkv=op.qkv, **vector_views(op), **rotation)),
        ]

    def _bind_gate_up(self, op: GateUp) -> list[Launch]:
        inputs = self._gemm(op, self._tiles(op))
        if op.gate_up is None:
            return [self._launch("gate_up", op.residual, GemmSwigluArguments(**inputs, intermediate=op.y))]
        return [
            self._launch("gate_up", op.residual, GemmStoreArguments(**inputs, y=op.gate_up)),
            self._launch("geglu", op.residual, GegluTilesArguments(gate_up=op.gate_up, intermediate=op.y)),
        ]

    def _tiles(self, op: Qkv | GateUp) -> View:
        """What the projection multiplies; in a model without norms before projections, x_norm is the residual."""
        return op.x_norm if op.norm_weight is not None else self._model.buffers["tiles.x_norm"]

    def _input(self, op: Qkv | GateUp) -> Launch:
        """What makes the projection's x."""
        if op.norm_weight is not None:
            return self._norm("norm", op)
        return self._launch("round", op.residual, RoundTilesArguments(residual=op.residual, x=self._tiles(op)))

    def _norm(self, kind: str, op: Qkv | GateUp | LmHead) -> Launch:
        arguments = RmsNormTilesArguments(residual=op.residual, norm_weight=op.norm_weight, x=op.x_norm)
        return self._launch(kind, op.residual, arguments)

    def _gemm(self, op: Qkv | ProjectAdd | GateUp | LmHead, x: View) -> dict[str, Any]:
        """The arguments that all projections share."""
        return {
            "weights": op.weight.codes,
            "x": x,
            "partials": self._scratch.sums,
            "token_tiles": self._kernels.token_tiles(op.kind, op.residual.shape[0]),
        }

    def _launch(self, kind: str, rows: View, arguments: tuple[DeviceArray | int, ...]) -> Launch:
        planned = self._kernels.kernel(kind, rows.shape[0])
        self._loaded.require([planned.spec])
        return Launch(self._loaded[planned.spec.name], planned.ctas, arguments, self._model.stream)
