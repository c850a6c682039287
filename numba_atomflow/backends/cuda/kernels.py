"""The kernels of a model's steps, and how each one's work is cut for a chip.

GEMV kernels exist for two widths: 1 token, and up to 8. Fewer tokens than a width are padded to it, and the results of
padding tokens are discarded: weights are read once, however many tokens there are.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.formats import HEAD_FORMATS, HeadFormat
from numba_atomflow.ops.cuda.attention.decode import attention_kernel
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, choose_kv_splits
from numba_atomflow.ops.cuda.gemv.kernels import make_qkv, make_store
from numba_atomflow.ops.cuda.gemv.projections import (
    MAX_GEMV_WIDTH,
    PROJECTIONS,
    Projections,
    fitting_widths,
    kind_of,
    projection_layouts,
)
from numba_atomflow.ops.cuda.layout.prepack import prepack_fp16_kernel, prepack_kernel
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.persistent.kernel import persistent_kernel
from numba_atomflow.ops.cuda.persistent.publish import publish_kernel
from numba_atomflow.ops.cuda.persistent.schedule import K_TILE_GROUPS, PersistentShape
from numba_atomflow.ops.cuda.persistent.wide_kernel import wide_kernel
from numba_atomflow.ops.cuda.prefill.buckets import bucket_for
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.advance import advance_kernel, post_rows_kernel
from numba_atomflow.ops.cuda.token.argmax import argmax_kernel, argmax_rows_kernel
from numba_atomflow.ops.cuda.token.embedding import embed_kernel
from numba_atomflow.ops.cuda.token.family import add_norm_kernel, cap_logits_kernel
from numba_atomflow.ops.cuda.token.logprobs import logprobs_kernel
from numba_atomflow.ops.cuda.token.rope import rope_kernel
from numba_atomflow.ops.cuda.token.sample import sample_kernel, sample_rows_kernel

if TYPE_CHECKING:
    from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels

WIDE_COLUMNS = (2, 4, 8)  # that the persistent kernel is compiled for, beside 1

# Most tokens of a prompt's step that the persistent kernel takes, where decode steps run in it: docs/prompts.md has the
# measurements, "Prompts of 2 to 8 tokens".
PROMPT_COLUMNS = 4
TOKEN_RING = 1024  # entries of the host ring; more than tokens that the host has not read yet


def has_separate_rope(geometry: ModelGeometry) -> bool:
    """Whether RoPE is a kernel of its own, because a bias or norms of whole heads come between QKV and RoPE; or because
    only the kernel without RoPE can do without a norm before the projection.
    """
    return geometry.qkv_bias or geometry.qk_norm or not geometry.pre_norm


class ModelKernels:
    """The kernels of one geometry on one chip.

    Args:
        head: format of the LM head.
        dependent: programmatic dependent launch; where the chip has it, if None.
        persistent: decode steps run in the persistent kernel, for which weights are prepacked in small k-tiles.
        chunk: most tokens of a prefill step on the GEMM path; 0: prompts run on the GEMV kernels.
        fp8_activations: of the GEMM path.
        window: positions of the sliding window; None if it is not shorter than the KV cache.

    Attributes:
        gemv_width: the greatest number of tokens that a GEMV kernel takes.
        prefill: the kernels of the GEMM path; None without it.
        prefill_chunk: most tokens of a prefill step.

    Raises:
        BackendError: one token's activations do not fit into the chip's shared memory.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        chip: Chip,
        head: HeadFormat = "fp8",
        *,
        dependent: bool | None = None,
        persistent: bool = False,
        chunk: int = 0,
        fp8_activations: bool = False,
        window: int | None = None,
    ) -> None:
        self.geometry, self.chip, self.head, self.window = geometry, chip, head, window
        self.dependent = chip.dependent_launch if dependent is None else dependent
        self.persistent = persistent
        self.layouts = self._layouts(K_TILE_GROUPS if persistent else 0)
        self.projections = Projections(geometry, chip, self.layouts, self.dependent)
        self.gemv_width = fitting_widths(range(1, MAX_GEMV_WIDTH + 1), self._shared_bytes, geometry, chip)[-1]
        self.prefill = self._prefill(chunk, fp8=fp8_activations) if chunk else None
        self.prefill_chunk = chunk or self.gemv_width

    # --- shapes ------------------------------------------------------------------------------------------------------

    @property
    def gemv_widths(self) -> tuple[int, ...]:
        """Token counts that GEMV kernels exist for, ascending."""
        return (1,) if self.gemv_width == 1 else (1, self.gemv_width)

    def on_gemm_path(self, tokens: int) -> bool:
        """Whether so many tokens run on the GEMM kernels: all that do not fit into a GEMV kernel.

        On an H200, 3B: 8 tokens take the GEMV kernels 1.5 ms, 16 tokens twice that; a chunk of 16 takes 2.2 ms.
        """
        return self.prefill is not None and tokens > self.gemv_width

    @property
    def prompt_widths(self) -> tuple[int, ...]:
        """Numbers of tokens for which the persistent kernel exists and takes a prompt's steps, ascending."""
        return tuple(n for n in self.wide_shapes if n <= PROMPT_COLUMNS) if self.persistent else ()

    def prompt_columns(self, tokens: int) -> int | None:
        """The number of tokens that a prompt's step of so many is padded to in the persistent kernel; None where other
        kernels take it. A single token is a decode step, or takes the GEMV kernels.
        """
        return next((width for width in self.prompt_widths if 1 < tokens <= width), None)

    def width_for(self, tokens: int) -> int:
        """The number of tokens that so many are padded to: a GEMV width, or a bucket of the GEMM path."""
        if self.on_gemm_path(tokens):
            return bucket_for(tokens)
        return next(width for width in self.gemv_widths if width >= tokens)

    def prompt_lengths(self, chunk: int) -> list[int]:
        """Lengths of prompts up to `chunk`, ascending: one for each number of tokens that prompts are padded to."""
        widths = self.gemv_widths + self.prompt_widths + (() if self.prefill is None else self.prefill.buckets)
        return sorted({min(width, chunk) for width in widths})

    @property
    def separate_rope_kernel(self) -> bool:
        """As `has_separate_rope`."""
        return has_separate_rope(self.geometry)

    def layout_of(self, part: str) -> PrepackedLayout:
        """The prepacked layout of a part of the checkpoint, such as ``layer.3.qkv`` or ``embedding``."""
        return self.layouts[kind_of(part)]

    def attention_shape(self, tokens: int) -> AttentionShape:
        """How attention of `tokens` tokens is cut."""
        g = self.geometry
        splits = choose_kv_splits(g.heads, g.kv_heads, tokens, self.chip.sms)
        out_width = self.layouts["o"].padded_in_features
        cap = g.attention_soft_cap or 0.0
        shape = AttentionShape(g.heads, g.kv_heads, g.head_dim, tokens, out_width, splits, soft_cap=cap)
        return replace(shape, kv_splits=max(1, splits // shape.value_parts))

    @cached_property
    def persistent_shape(self) -> PersistentShape:
        """How the persistent kernel is cut for this model and chip; its `refusal` says whether it can run."""
        return persistent_shape(self.geometry, self._layouts(K_TILE_GROUPS), self.chip)

    @cached_property
    def wide_shapes(self) -> dict[int, PersistentShape]:
        """How the persistent kernel is cut for several tokens, by their number: as many as its shared memory has room
        for. The cache has spare positions for padding tokens, `gemv_width` - 1 of them.
        """
        shapes = {columns: replace(self.persistent_shape, columns=columns) for columns in WIDE_COLUMNS}
        return {n: shape for n, shape in shapes.items() if n <= self.gemv_width and shape.refusal() is None}

    def _layouts(self, k_tile: int) -> dict[str, PrepackedLayout]:
        return projection_layouts(
            self.geometry,
            self.chip,
            head=HEAD_FORMATS[self.head],
            separate_rope=self.separate_rope_kernel,
            k_tile=k_tile,
        )

    def _prefill(self, chunk: int, *, fp8: bool) -> "PrefillKernels":
        from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels  # a start without the GEMM path does without

        return PrefillKernels(
            self.geometry,
            self.chip,
            self.layouts,
            chunk=chunk,
            dependent=self.dependent,
            separate_rope=self.separate_rope_kernel,
            fp8=fp8,
            window=self.window,
        )

    def _shared_bytes(self, tokens: int) -> int:
        return max(self.projections.shared_bytes(tokens), self.attention_shape(tokens).shared_bytes)

    # --- kernels -----------------------------------------------------------------------------------------------------

    @property
    def start(self) -> list[Planned]:
        """The kernels that loading, decode steps and the end of every prompt need; others are loaded on first use.

        Where decode steps run in the persistent kernel, those of single tokens are not among them.
        """
        names = ["argmax", "sample", "advance", "advance_sampled", "lm_head_x1"]
        names += [name for name in ("prepack", "prepack_fp16", "persistent") if name in self.planned]
        names += ["cap_logits"] if self.geometry.logit_soft_cap else []
        kernels = [self.planned[name] for name in names]
        return kernels if self.persistent else kernels + self.layer_kernels(1)

    @property
    def head_rows(self) -> int:
        """Most rows whose logits are computed at once."""
        return self.gemv_width if self.prefill is None else max(self.prefill.head_rows, self.gemv_width)

    def layer_kernels(self, width: int) -> list[Planned]:
        """The kernels of the layers of a step that is padded to `width` tokens, and of its embedding."""
        if self.prefill is not None and self.on_gemm_path(width):
            return [self.prefill.kernel(kind, width) for kind in self.prefill.layer_kinds]
        kinds = ["embed", "qkv", "attention", "o", "gate_up", "down"] + ["rope"] * self.separate_rope_kernel
        kinds += ["window_attention"] * (self.window is not None) + ["add_norm"] * self.geometry.post_norm
        return [self.planned[f"{kind}_x{width}"] for kind in kinds]

    def chunk_kernels(self, tokens: int) -> list[Planned]:
        """The kernels of the layers of a prompt's step of so many tokens, and of its embedding."""
        columns = self.prompt_columns(tokens)
        if columns is not None:
            return [self.planned[f"persistent_x{columns}"]]
        return self.layer_kernels(self.width_for(tokens))

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """All kernels by name; those of a GEMV width are called ``<kind>_x<width>``."""
        vocabulary, dependent = self.geometry.vocabulary, self.dependent
        kernels = [
            prepack_kernel(self.chip.fp8_converter),
            argmax_kernel(vocabulary, self.chip.sms, dependent),
            sample_kernel(vocabulary, dependent),
            logprobs_kernel(vocabulary, dependent),
            advance_kernel(TOKEN_RING, sampled=False, dependent=dependent),
            advance_kernel(TOKEN_RING, sampled=True, dependent=dependent),
        ]
        for width in self.gemv_widths:
            kernels += self._step_kernels(width)
        if not HEAD_FORMATS[self.head].scaled:
            kernels.append(prepack_fp16_kernel())
        if self.geometry.logit_soft_cap is not None:
            kernels.append(cap_logits_kernel(self.geometry.logit_soft_cap, self.chip.sms, dependent=dependent))
        if self.persistent:
            kernels += [persistent_kernel(self.persistent_shape), publish_kernel(self.persistent_shape)]
            kernels += [wide_kernel(shape) for shape in self.wide_shapes.values()]
            kernels += [
                argmax_rows_kernel(vocabulary, self.chip.sms, dependent),
                sample_rows_kernel(vocabulary, dependent),
                post_rows_kernel(TOKEN_RING, vocabulary, dependent),
            ]
        return {kernel.spec.name: kernel for kernel in kernels}

    def _step_kernels(self, width: int) -> list[Planned]:
        g, dependent, shape = self.geometry, self.dependent, self.attention_shape(width)
        qkv = make_store if self.separate_rope_kernel else make_qkv
        kernels = [
            embed_kernel(self.layouts["embedding"], width),
            attention_kernel(f"attention_x{width}", shape, dependent=dependent),
            *(self.projections.kernel(kind, width, qkv) for kind in PROJECTIONS),
        ]
        if self.separate_rope_kernel:
            kernels.append(self._rope(width))
        if self.window is not None:
            in_window = replace(shape, window=self.window)
            kernels.append(attention_kernel(f"window_attention_x{width}", in_window, dependent=dependent))
        if g.post_norm:
            kernels.append(add_norm_kernel(f"add_norm_x{width}", g.hidden, g.norm_eps, width, dependent=dependent))
        return kernels

    def _rope(self, width: int) -> Planned:
        g = self.geometry
        return rope_kernel(
            heads=g.heads,
            kv_heads=g.kv_heads,
            head_dim=g.head_dim,
            tokens=width,
            eps=g.norm_eps,
            bias=g.qkv_bias,
            norm=g.qk_norm,
            norm_of_all_heads=g.qk_norm_of_all_heads,
            dependent=self.dependent,
        )

    @cached_property
    def persistent_traced(self) -> Planned:
        """The persistent kernel that also writes timestamps; not among `planned`, because only a trace needs it."""
        return persistent_kernel(replace(self.persistent_shape, trace=True))

    def wide_traced(self, columns: int) -> Planned:
        """The persistent kernel for so many tokens that also writes timestamps."""
        return wide_kernel(replace(self.wide_shapes[columns], trace=True))


def persistent_shape(g: ModelGeometry, layouts: Mapping[str, PrepackedLayout], chip: Chip) -> PersistentShape:
    """How the persistent kernel of one GPU is cut for a model.

    Args:
        layouts: of the weights in small k-tiles, by kind of projection.
    """
    return PersistentShape(
        layers=g.layers,
        hidden=g.hidden,
        intermediate=g.ffn,
        heads=g.heads,
        kv_heads=g.kv_heads,
        head_dim=g.head_dim,
        eps=g.norm_eps,
        sms=chip.sms,
        shared_bytes=chip.shared_bytes,
        qkv=layouts["qkv"],
        o=layouts["o"],
        gate_up=layouts["gate_up"],
        down=layouts["down"],
        lm_head=layouts["lm_head"],
        embedding=layouts["embedding"],
        qkv_bias=g.qkv_bias,
        qk_norm=g.qk_norm,
    )
