"""The kernels of a model's steps, and how each one's work is cut for a chip.

GEMV kernels exist for two widths: 1 token, and up to 8. Fewer tokens than a width are padded to it, and the results of
padding tokens are discarded: weights are read once, however many tokens there are.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from numba_atomflow.checkpoint.format import HeadFormat
from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.attention.decode import attention_kernel
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, choose_kv_splits
from numba_atomflow.ops.cuda.gemv.kernels import make_add, make_qkv, make_store, make_swiglu, projection_kernel
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan, choose_plan
from numba_atomflow.ops.cuda.layout import weights
from numba_atomflow.ops.cuda.layout.weights import FragmentLayout
from numba_atomflow.ops.cuda.persistent.kernel import persistent_kernel
from numba_atomflow.ops.cuda.persistent.publish import publish_kernel
from numba_atomflow.ops.cuda.persistent.schedule import CHUNK, PersistentShape
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.advance import advance_kernel
from numba_atomflow.ops.cuda.token.argmax import argmax_kernel
from numba_atomflow.ops.cuda.token.embedding import embed_kernel
from numba_atomflow.ops.cuda.token.rope import rope_kernel
from numba_atomflow.ops.cuda.token.sample import sample_kernel

GREATEST_GEMV_WIDTH = 8  # N of `mma.m16n8k16`
TOKEN_RING = 1024  # entries of the host ring; more than tokens that the host has not read yet


class ModelKernels:
    """The kernels of one geometry on one chip.

    Args:
        head: format of the LM head.
        dependent: programmatic dependent launch; where the chip has it, if None.
        persistent: decode steps run in the persistent kernel, for which weights are prepacked in small k-tiles.

    Attributes:
        gemv_width: the greatest number of tokens that a GEMV kernel takes.

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
    ) -> None:
        self.geometry, self.chip, self.head = geometry, chip, head
        self.dependent = chip.dependent_launch if dependent is None else dependent
        self.persistent = persistent
        self.gemv_width = next((n for n in range(GREATEST_GEMV_WIDTH, 0, -1) if self._fits(n)), 0)
        if not self.gemv_width:
            raise BackendError(
                f"A token of this model (ffn {geometry.ffn}) needs more than the {chip.shared_bytes // 1024} KB of "
                "shared memory that this GPU has; use --backend cpu."
            )

    # --- shapes ------------------------------------------------------------------------------------------------------

    @cached_property
    def layouts(self) -> dict[str, FragmentLayout]:
        """The prepacked layout of each kind of projection."""
        return self._layouts(CHUNK if self.persistent else 0)

    def _layouts(self, chunk: int) -> dict[str, FragmentLayout]:
        g, fp8, halves = self.geometry, self.chip.hardware_fp8, self.head == "fp16"
        half = 0 if self.separate_rope_kernel else g.head_dim // 2
        return {
            "embedding": FragmentLayout(g.vocabulary, g.hidden, 0, fp8, halves and g.tied_embeddings, chunk),
            "qkv": FragmentLayout(g.q_dim + 2 * g.kv_dim, g.hidden, half, fp8, False, chunk),
            "o": FragmentLayout(g.hidden, g.q_dim, 0, fp8, False, chunk),
            "gate_up": FragmentLayout(2 * g.ffn, g.hidden, g.ffn, fp8, False, chunk),
            "down": FragmentLayout(g.hidden, g.ffn, 0, fp8, False, chunk),
            "lm_head": FragmentLayout(g.vocabulary, g.hidden, 0, fp8, halves, chunk),
        }

    @cached_property
    def persistent_shape(self) -> PersistentShape:
        """How the persistent kernel is cut for this model and chip; ask its `refusal` whether it can run."""
        g, layouts = self.geometry, self._layouts(CHUNK)
        return PersistentShape(
            layers=g.layers,
            hidden=g.hidden,
            ffn=g.ffn,
            heads=g.heads,
            kv_heads=g.kv_heads,
            head_dim=g.head_dim,
            eps=g.norm_eps,
            sms=self.chip.sms,
            shared_bytes=self.chip.shared_bytes,
            qkv=layouts["qkv"],
            o=layouts["o"],
            gate_up=layouts["gate_up"],
            down=layouts["down"],
            vocabulary=layouts["lm_head"],
            embedding=layouts["embedding"],
        )

    @property
    def separate_rope_kernel(self) -> bool:
        """Whether RoPE is a kernel of its own, because a bias or norms of whole heads come between QKV and RoPE."""
        return self.geometry.qkv_bias or self.geometry.qk_norm

    def layout_of(self, part: str) -> FragmentLayout:
        """The prepacked layout of a part of the checkpoint, such as ``layer.3.qkv`` or ``embedding``."""
        kind = part.rpartition(".")[2]
        return self.layouts["lm_head" if kind == "vocabulary" else kind]

    def attention_shape(self, tokens: int) -> AttentionShape:
        """How attention of `tokens` tokens is cut."""
        g = self.geometry
        splits = choose_kv_splits(g.heads, g.kv_heads, tokens, self.chip.sms)
        return AttentionShape(g.heads, g.kv_heads, g.head_dim, tokens, self.layouts["o"].padded_columns, splits)

    @property
    def _projections(self) -> list[str]:
        return [kind for kind in self.layouts if kind != "embedding"]

    def _plan(self, kind: str, tokens: int) -> GemvPlan:
        return choose_plan(self.layouts[kind], tokens, self.chip.sms)

    def _fits(self, tokens: int) -> bool:
        needed = [self._plan(kind, tokens).shared_bytes for kind in self._projections]
        needed.append(self.attention_shape(tokens).shared_bytes)
        return max(needed) <= self.chip.shared_bytes

    # --- kernels -----------------------------------------------------------------------------------------------------

    @cached_property
    def gemv_widths(self) -> tuple[int, ...]:
        """Token counts that GEMV kernels exist for, ascending."""
        return (1,) if self.gemv_width == 1 else (1, self.gemv_width)

    @property
    def prefill_chunk(self) -> int:
        """Most tokens of a prefill step: today prefill runs on the GEMV kernels."""
        return self.gemv_width

    def width_for(self, tokens: int) -> int:
        """The GEMV width that so many tokens are padded to."""
        return next(width for width in self.gemv_widths if width >= tokens)

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """All kernels by name: those of a GEMV width are called ``<kind>_x<width>``."""
        argmax = argmax_kernel(self.geometry.vocabulary, self.chip.sms, self.dependent)
        kernels = [weights.repack_kernel(self.chip.hardware_fp8), argmax]
        kernels.append(sample_kernel(self.geometry.vocabulary, self.dependent))
        kernels += [advance_kernel(TOKEN_RING, sampled=on, dependent=self.dependent) for on in (False, True)]
        for width in self.gemv_widths:
            kernels += [embed_kernel(self.layouts["embedding"], width), self._attention(width)]
            kernels += [self._projection(kind, width) for kind in self._projections]
            if self.separate_rope_kernel:
                kernels.append(self._rope(width))
        if self.head == "fp16":
            kernels.append(weights.repack_halves_kernel())
        if self.persistent:
            kernels += [persistent_kernel(self.persistent_shape), publish_kernel(self.persistent_shape)]
        return {kernel.spec.name: kernel for kernel in kernels}

    @cached_property
    def persistent_traced(self) -> Planned:
        """The persistent kernel that also writes timestamps; not among `planned`, because only a trace needs it."""
        return persistent_kernel(replace(self.persistent_shape, trace=True))

    def _projection(self, kind: str, tokens: int) -> Planned:
        g = self.geometry
        factory: Callable[..., Any]
        more: dict[str, object] = {"eps": g.norm_eps}
        match kind:
            case "qkv" if self.separate_rope_kernel:
                factory = make_store
            case "qkv":
                factory = make_qkv
                more |= {"heads": g.heads, "kv_heads": g.kv_heads}
            case "gate_up":
                factory = make_swiglu
                more |= {"y_pitch": self.layouts["down"].padded_columns}
            case "lm_head":
                factory = make_store
            case _:
                factory, more = make_add, {}
        shape, sms = self._plan(kind, tokens), self.chip.sms
        return projection_kernel(f"{kind}_x{tokens}", factory, shape, sms, self.dependent, **more)

    def _attention(self, tokens: int) -> Planned:
        return attention_kernel(f"attention_x{tokens}", self.attention_shape(tokens), dependent=self.dependent)

    def _rope(self, tokens: int) -> Planned:
        g = self.geometry
        return rope_kernel(
            *(g.heads, g.kv_heads, g.head_dim, tokens, g.norm_eps),
            bias=g.qkv_bias,
            norm=g.qk_norm,
            dependent=self.dependent,
        )
