"""Which kernels the sandbox's steps are made of on a GPU, and how each one's work is cut.

A step has 1, 2, 4 or 8 columns; what does not fill one is padded with columns that nobody looks at. Projections are
the engine's; attention comes in three forms: `paged` for each block size, `static` (every sequence contiguous), and
`single`, the engine's own for one token, to which a single stream is compared.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba_atomflow.errors import BackendError
from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.memory.paged import paged_cache_buffer
from numba_atomflow.memory.plan import Buffer, MemoryPlan, Pool, plan_memory
from numba_atomflow.ops.cuda.attention.decode import attention_kernel
from numba_atomflow.ops.cuda.attention.paged import paged_attention_kernel
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, Paging, choose_kv_splits
from numba_atomflow.ops.cuda.gemv.kernels import (
    make_add,
    make_paged_qkv,
    make_qkv,
    make_store,
    make_swiglu,
    projection_kernel,
)
from numba_atomflow.ops.cuda.gemv.plan import GemvPlan, choose_plan
from numba_atomflow.ops.cuda.layout import weights
from numba_atomflow.ops.cuda.layout.weights import FragmentLayout
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.argmax import argmax_kernel
from numba_atomflow.ops.cuda.token.embedding import embed_kernel
from numba_atomflow.sandbox.runner import CacheSizes

WIDTHS = (1, 2, 4, 8)  # columns of a step
PROJECTIONS = ("qkv", "o", "gate_up", "down", "lm_head")
STEP_INPUTS = ("positions", "known", "rows", "slots", "tokens")  # int64 each, in one buffer that a step brings along
_STAGING = 4 << 20  # bytes behind the weights at least, where loading puts what it repacks


class SandboxKernels:
    """The kernels of one model, cache and chip.

    Args:
        halves: the vocabulary projection is float16.
        same_width: every step has the greatest width, padded: then a token's bits do not depend on how many others go
            through the model with it. Otherwise a step is as narrow as it can be, and sums are taken in other orders.

    Raises:
        BackendError: one token's activations do not fit into the chip's shared memory.
    """

    def __init__(
        self, geometry: ModelGeometry, chip: Chip, sizes: CacheSizes, *, halves: bool, same_width: bool = False
    ) -> None:
        self.geometry, self.chip, self.sizes, self.halves = geometry, chip, sizes, halves
        self.widths = tuple(width for width in WIDTHS if self._fits(width))[-1 if same_width else 0 :]
        if not self.widths:
            raise BackendError(
                f"A token of this model (ffn {geometry.ffn}) needs more than the {chip.shared_bytes // 1024} KB of "
                "shared memory that this GPU has; use --backend cpu."
            )

    # --- shapes ------------------------------------------------------------------------------------------------------

    @cached_property
    def layouts(self) -> dict[str, FragmentLayout]:
        """Fragment order of each kind of projection."""
        g, fp8 = self.geometry, self.chip.hardware_fp8
        return {
            "embedding": FragmentLayout(g.vocabulary, g.hidden, 0, fp8, self.halves and g.tied_embeddings),
            "qkv": FragmentLayout(g.q_dim + 2 * g.kv_dim, g.hidden, g.head_dim // 2, fp8),
            "o": FragmentLayout(g.hidden, g.q_dim, 0, fp8),
            "gate_up": FragmentLayout(2 * g.ffn, g.hidden, g.ffn, fp8),
            "down": FragmentLayout(g.hidden, g.ffn, 0, fp8),
            "lm_head": FragmentLayout(g.vocabulary, g.hidden, 0, fp8, self.halves),
        }

    def layout_of(self, part: str) -> FragmentLayout:
        """The fragment order of a part of the checkpoint, such as ``layer.3.qkv``."""
        kind = part.rpartition(".")[2]
        return self.layouts["lm_head" if kind == "vocabulary" else kind]

    def width_for(self, columns: int) -> int:
        """The step that so many columns take."""
        return next(width for width in self.widths if width >= columns)

    def attention_shape(self, width: int) -> AttentionShape:
        """How one token's attention is cut in a step of this width: about a block per multiprocessor in all."""
        g = self.geometry
        splits = max(1, choose_kv_splits(g.heads, g.kv_heads, 1, self.chip.sms) // width)
        return AttentionShape(g.heads, g.kv_heads, g.head_dim, 1, self.layouts["o"].padded_columns, splits)

    def _plan(self, kind: str, width: int) -> GemvPlan:
        return choose_plan(self.layouts[kind], width, self.chip.sms)

    def _fits(self, width: int) -> bool:
        needed = [self._plan(kind, width).shared_bytes for kind in PROJECTIONS]
        return max(*needed, self.attention_shape(width).shared_bytes) <= self.chip.shared_bytes

    # --- memory ------------------------------------------------------------------------------------------------------

    def plan(self, vectors: dict[str, int], projections: list[str]) -> MemoryPlan:
        """Everything that is kept on the device.

        Args:
            vectors: sizes of norms by name. projections: names of the checkpoint's parts that are matrices.
        """
        g, most = self.geometry, self.widths[-1]
        shapes = {width: self.attention_shape(width) for width in self.widths}
        pad = {name: -(-n // GROUP) * GROUP for name, n in (("h", g.hidden), ("q", g.q_dim), ("f", g.ffn))}

        def buffer(pool: Pool, name: str, dtype: str, *shape: int) -> Buffer:
            return Buffer(pool, name, shape, dtype)

        buffers = [
            *(buffer("weights", part, "uint32", self.layout_of(part).words) for part in projections),
            *(buffer("weights", name, "float32", size) for name, size in vectors.items()),
            # One block more than sequences have: where the columns that pad a step write to.
            paged_cache_buffer(g.layers, self.sizes.slots + max(self.sizes.block_sizes), g.kv_dim, "float16"),
            buffer("activations", "step", "int64", len(STEP_INPUTS), most),
            buffer("activations", "pages", "int32", self.sizes.sequences + 1, self.sizes.table_width),
            buffer("activations", "residual", "float32", most, g.hidden),
            buffer("activations", "normed", "float16", most, pad["h"]),
            buffer("activations", "q", "float16", most, g.q_dim),
            buffer("activations", "attended", "float16", most, pad["q"]),
            buffer("activations", "ffn", "float16", most, pad["f"]),
            buffer("activations", "logits", "float32", most, g.vocabulary),
            buffer("activations", "best", "int64", most),
            buffer("workspace", "cosines", "float32", self.sizes.longest, g.head_dim // 2),
            buffer("workspace", "sines", "float32", self.sizes.longest, g.head_dim // 2),
            buffer("workspace", "partials", "float32", max(n * shape.partials for n, shape in shapes.items())),
            buffer("workspace", "counters", "uint32", max(n * shape.work_tiles for n, shape in shapes.items())),
            buffer("workspace", "seen", "uint32", -(-g.vocabulary // 32)),
            buffer("workspace", "options", "float64", 5),
            buffer("workspace", "staging", "uint8", _STAGING),
        ]
        return plan_memory(buffers)

    # --- kernels -----------------------------------------------------------------------------------------------------

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """All kernels by name; what a step of n columns takes is called ``<kind>_x<n>``."""
        chip = self.chip
        argmax = argmax_kernel(self.geometry.vocabulary, chip.sms, chip.dependent_launch)
        kernels = [
            weights.repack_kernel(chip.hardware_fp8),
            argmax,
            self._attention(1, "single", None),
            self._single_qkv,
        ]
        if self.halves:
            kernels.append(weights.repack_halves_kernel())
        for width in self.widths:
            kernels.append(embed_kernel(self.layouts["embedding"], width))
            kernels += [self._projection(kind, width) for kind in PROJECTIONS]
            kernels.append(self._attention(width, "static", Paging(width, 0, self.sizes.capacity)))
            for size in self.sizes.block_sizes:
                kernels.append(self._attention(width, f"paged{size}", Paging(width, size, self.sizes.table_width)))
        return {kernel.spec.name: kernel for kernel in kernels}

    def _attention(self, width: int, form: str, paging: Paging | None) -> Planned:
        name, shape, dependent = f"attention_{form}_x{width}", self.attention_shape(width), self.chip.dependent_launch
        if paging is None:
            return attention_kernel(name, shape, dependent=dependent)
        return paged_attention_kernel(name, shape, paging, dependent=dependent)

    def _projection(self, kind: str, width: int) -> Planned:
        g = self.geometry
        factory: Callable[..., Any]
        more: dict[str, object] = {"eps": g.norm_eps}
        match kind:
            case "qkv":
                factory = make_paged_qkv
                more |= {"heads": g.heads, "kv_heads": g.kv_heads}
            case "gate_up":
                factory = make_swiglu
                more |= {"y_pitch": self.layouts["down"].padded_columns}
            case "lm_head":
                factory = make_store
            case _:
                factory, more = make_add, {}
        return self._projection_kernel(f"{kind}_x{width}", kind, width, factory, more)

    @property
    def _single_qkv(self) -> Planned:
        """The engine's own, with one position for rotation and cache."""
        g = self.geometry
        more: dict[str, object] = {"eps": g.norm_eps, "heads": g.heads, "kv_heads": g.kv_heads}
        return self._projection_kernel("qkv_single_x1", "qkv", 1, make_qkv, more)

    def _projection_kernel(
        self, name: str, kind: str, width: int, factory: Callable[..., Any], more: dict[str, object]
    ) -> Planned:
        shape, chip = self._plan(kind, width), self.chip
        return projection_kernel(name, factory, shape, chip.sms, chip.dependent_launch, **more)
