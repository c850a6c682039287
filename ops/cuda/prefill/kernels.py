"""The kernels of prefill steps on the GEMM path: a chunk of many tokens, padded to a bucket.

A layer is: RMSNorm to tiles, QKV with RoPE and KV cache (or stored, with RoPE as a kernel of its own), attention to
tiles, O, RMSNorm to tiles, gate and up with SwiGLU to tiles, down. Most kernels serve every bucket, and a projection's
serves all for which its tiling is the same; a launch has its own grid.

With FP8 activations RMSNorm writes FP8 tiles, and so does attention where a head is a group of 128. The other inputs,
that of down always, are written in float16 and quantized by a kernel of their own. The LM head always takes float16.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from numba_atomflow.ops.cuda.attention.prefill import prefill_attention_kernel
from numba_atomflow.ops.cuda.attention.prefill_fp8 import HEAD_DIM as FP8_HEAD_DIM
from numba_atomflow.ops.cuda.attention.prefill_plan import (
    FEW_QUERIES,
    PrefillAttentionPlan,
    choose_prefill_attention_plan,
)
from numba_atomflow.ops.cuda.gemm.kernels import (
    gemm_kernel,
    make_gemm_add,
    make_gemm_qkv,
    make_gemm_store,
    make_gemm_swiglu,
)
from numba_atomflow.ops.cuda.gemm.plan import MOST_PADDING, SM_90, GemmPlan, choose_gemm_plan
from numba_atomflow.ops.cuda.gemv.projections import ModelSizes
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for, buckets_up_to
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.embedding import embed_chunk_kernel, embed_ctas
from numba_atomflow.ops.cuda.token.family import add_norm_kernel, geglu_tiles_kernel, round_tiles_kernel
from numba_atomflow.ops.cuda.token.quantize_tiles import quantize_tiles_ctas, quantize_tiles_kernel
from numba_atomflow.ops.cuda.token.rms_norm import rms_norm_tiles_kernel
from numba_atomflow.ops.cuda.token.rope import rope_chunk_kernel, rope_ctas

HEAD_ROWS = 128  # most rows whose logits are computed at once: each takes 4 bytes per token of the vocabulary
QUANTIZED = {"o": ("attn_out", "attn_out_fp8"), "down": ("intermediate", "intermediate_fp8")}  # float16 and FP8 tiles


class DecoderSizes(ModelSizes, Protocol):
    """What the kernels of its prompts depend on: of a `ModelGeometry`."""

    @property
    def qkv_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def qk_norm_of_all_heads(self) -> bool: ...
    @property
    def attention_soft_cap(self) -> float | None: ...


class PrefillKernels:
    """The kernels of the GEMM path of one geometry on one chip.

    Args:
        layouts: of the weights, by kind of projection.
        chunk: most tokens of a step.
        dependent: programmatic dependent launch.
        separate_rope: RoPE is a kernel of its own.
        fp8: the layers' projections take FP8 activations.
        window: positions of the sliding window; None if it is not shorter than the KV cache.

    Attributes:
        capacity: tokens that activations have room for, padding included.
        tiles: of the tiled activations, by the name of their buffer.
        quantized: the kinds of projections whose inputs are quantized by a kernel of their own.
    """

    def __init__(
        self,
        geometry: DecoderSizes,
        chip: Chip,
        layouts: Mapping[str, PrepackedLayout],
        *,
        chunk: int,
        dependent: bool,
        separate_rope: bool,
        fp8: bool = False,
        window: int | None = None,
    ) -> None:
        self._geometry, self._chip, self._layouts, self._dependent = geometry, chip, layouts, dependent
        self._separate_rope, self._window = separate_rope, window
        self.buckets = buckets_up_to(chunk)
        self.capacity = self.buckets[-1] + MOST_PADDING
        g, head_bits = geometry, layouts["lm_head"].format.bits
        bits = 8 if fp8 else 16
        attention_bits = bits if g.head_dim == FP8_HEAD_DIM else 16
        self.quantized = [kind for kind in QUANTIZED if fp8 and (kind != "o" or attention_bits == 16)]
        self.tiles = {
            "x_norm": ActivationTiles(g.hidden, self.capacity, bits),
            "attn_out": ActivationTiles(g.q_dim, self.capacity, attention_bits),
            "intermediate": ActivationTiles(g.ffn, self.capacity),
            "final_x_norm": ActivationTiles(g.hidden, self.head_rows, weight_bits=head_bits),
        }
        for kind in self.quantized:
            source, target = QUANTIZED[kind]
            self.tiles[target] = ActivationTiles(self.tiles[source].in_features, self.capacity, bits=8)
        self._kernels: dict[tuple[str, int], Planned] = {}
        self._plans: dict[tuple[str, int], GemmPlan] = {}

    @property
    def head_rows(self) -> int:
        """Most rows whose logits are computed at once, padding included."""
        return min(HEAD_ROWS, self.buckets[-1])

    @property
    def layer_kinds(self) -> list[str]:
        """The kinds of the kernels that a step's embedding and layers take."""
        g = self._geometry
        kinds = ["embed", "norm" if g.pre_norm else "round", "qkv", "attention", "o", "gate_up", "down"]
        others = {
            "rope": self._separate_rope,
            "window_attention": self._window is not None,
            "geglu": g.hidden_act != "silu",
            "add_norm": g.post_norm,
        }
        kinds += [kind for kind, has in others.items() if has]
        return kinds + [f"quantize_{kind}" for kind in self.quantized]

    @property
    def head_kinds(self) -> list[str]:
        """The kinds of the kernels that logits of many rows take."""
        return ["final_norm", "lm_head"]

    def kernel(self, kind: str, tokens: int) -> Planned:
        """The kernel of a kind, with its grid for a step of `tokens` tokens, which are padded to a bucket."""
        key = kind, bucket_for(tokens)
        if key not in self._kernels:
            planned = self._plan(*key)
            if self._chip.capability == SM_90:  # else a GEMM's second CTA might find no room on its SM, and never run
                planned = replace(planned, spec=replace(planned.spec, whole_carveout=True))
            self._kernels[key] = planned
        return self._kernels[key]

    def gemm_plan(self, kind: str, tokens: int) -> GemmPlan:
        """The tiling of a projection for a step of `tokens` tokens, which are padded to a bucket."""
        key = kind, bucket_for(tokens)
        if key not in self._plans:
            x = self.tiles[self.input_of(kind)]
            self._plans[key] = choose_gemm_plan(self._layouts[kind], x, key[1], self._chip)
        return self._plans[key]

    def input_of(self, kind: str) -> str:
        """The name of the tiles that a projection reads."""
        if kind in QUANTIZED:
            return QUANTIZED[kind][kind in self.quantized]
        return "final_x_norm" if kind == "lm_head" else "x_norm"

    def token_tiles(self, kind: str, tokens: int) -> int:
        """Tiles along the tokens that a launch of a projection computes: the bucket's, the last one perhaps partly."""
        return -(-bucket_for(tokens) // self.gemm_plan(kind, tokens).tile_tokens)

    @cached_property
    def scratch(self) -> tuple[int, int, int]:
        """Partial sums of projections, float32 results and counters of attention, for the kernels of every bucket."""
        heads = [bucket for bucket in self.buckets if bucket <= self.head_rows]
        layers = ("qkv", "o", "gate_up", "down")
        plans = [self.gemm_plan(kind, bucket) for kind in layers for bucket in self.buckets]
        plans += [self.gemm_plan("lm_head", bucket) for bucket in heads]
        windows = (0, self._window or 0)
        attentions = [self._attention_plan(window, bucket) for window in windows for bucket in self.buckets]
        attention_partials = max(plan.partials for plan in attentions)
        return max(plan.partials for plan in plans), attention_partials, max(plan.counters for plan in attentions)

    def _attention_plan(self, window: int, bucket: int) -> PrefillAttentionPlan:
        g, out = self._geometry, self.tiles["attn_out"]
        cap, few = g.attention_soft_cap or 0.0, bucket <= FEW_QUERIES
        return choose_prefill_attention_plan(
            g.heads, g.kv_heads, g.head_dim, out, self._chip, window=window, soft_cap=cap, few=few
        )

    def _plan(self, kind: str, bucket: int) -> Planned:
        g, dependent = self._geometry, self._dependent
        match kind:
            case "embed":
                layout = self._layouts["embedding"]
                return replace(embed_chunk_kernel(layout), ctas=embed_ctas(layout, bucket))
            case "norm" | "final_norm":
                tiles = self.tiles["x_norm" if kind == "norm" else "final_x_norm"]
                return replace(rms_norm_tiles_kernel(f"{kind}_tiles", tiles, g.norm_eps, dependent), ctas=bucket)
            case "quantize_o" | "quantize_down":
                x, y = (self.tiles[name] for name in QUANTIZED[kind.removeprefix("quantize_")])
                planned = quantize_tiles_kernel(f"{kind}_tiles", x, y, dependent=dependent)
                return replace(planned, ctas=quantize_tiles_ctas(y, bucket))
            case "rope":
                return replace(self._rope(), ctas=rope_ctas(g.heads, g.kv_heads, bucket))
            case "attention" | "window_attention":
                window = 0 if kind == "attention" else self._window or 0
                plan, most = (self._attention_plan(window, size) for size in (bucket, self.buckets[-1]))
                name = f"{kind}_chunk" if plan == most else f"{kind}_few"
                return replace(prefill_attention_kernel(name, plan, dependent), ctas=plan.ctas(bucket))
            case "round":
                return round_tiles_kernel(self.tiles["x_norm"], bucket, dependent=dependent)
            case "geglu":
                return geglu_tiles_kernel(self.tiles["intermediate"], bucket, dependent=dependent)
            case "add_norm":
                return add_norm_kernel("add_norm_chunk", g.hidden, g.norm_eps, bucket, dependent=dependent)
        return self.projection(kind, self.gemm_plan(kind, bucket))

    def projection(self, kind: str, plan: GemmPlan) -> Planned:
        """The kernel of a projection with this tiling, of its weights and its x."""
        g, options = self._geometry, dict[str, Any]()
        factory: Callable[..., Any]
        match kind:
            case "qkv" if not self._separate_rope:
                factory, options = make_gemm_qkv, {"heads": g.heads, "kv_heads": g.kv_heads}
            case "gate_up" if g.hidden_act == "silu":
                factory, options = make_gemm_swiglu, {"intermediate": self.tiles["intermediate"]}
            case "o" | "down" if not g.post_norm:
                factory = make_gemm_add
            case _:
                factory = make_gemm_store
        return gemm_kernel(f"{kind}_n{plan.tile_tokens}", factory, plan, self._dependent, **options)

    def _rope(self) -> Planned:
        g = self._geometry
        return rope_chunk_kernel(
            g.heads,
            g.kv_heads,
            g.head_dim,
            g.norm_eps,
            bias=g.qkv_bias,
            norm=g.qk_norm,
            norm_of_all_heads=g.qk_norm_of_all_heads,
            dependent=self._dependent,
        )
