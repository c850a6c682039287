"""The kernels of the sandbox's steps on a GPU, and how each one's work is cut.

A step has 1, 2, 4 or 8 tokens; fewer are padded, and the results of padding tokens are discarded. Projections are the
engine's. Attention has three forms: `paged` for each block size, `static` (every sequence contiguous), and `single`,
the engine's own for one token, to which a single stream is compared.

A long prompt runs by itself, in chunks on the engine's GEMM path. Its kernels need a contiguous KV cache: each layer's
keys and values are copied out of their KV blocks first, and the chunk's into them afterwards.
"""

from functools import cached_property

from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.memory.paged import paged_cache_buffer
from numba_atomflow.memory.plan import Buffer, MemoryPlan, Pool, plan_memory
from numba_atomflow.ops.cuda.attention.copy_blocks import copy_blocks_kernels
from numba_atomflow.ops.cuda.attention.decode import attention_kernel
from numba_atomflow.ops.cuda.attention.paged import Paging, paged_attention_kernel
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, choose_kv_splits
from numba_atomflow.ops.cuda.gemv.kernels import make_paged_qkv, make_qkv
from numba_atomflow.ops.cuda.gemv.projections import (
    PROJECTIONS,
    Projections,
    fitting_widths,
    kind_of,
    projection_layouts,
)
from numba_atomflow.ops.cuda.layout.prepack import prepack_fp16_kernel, prepack_kernel
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.prefill.kernels import PrefillKernels
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.ops.cuda.token.argmax import argmax_kernel
from numba_atomflow.ops.cuda.token.embedding import embed_kernel
from numba_atomflow.ops.formats import FP8_E4M3, KV_FLOAT16, WeightFormat
from numba_atomflow.sandbox.runner import CacheSizes

GEMV_WIDTHS = (1, 2, 4, 8)  # tokens of a step
# int64 each, in one buffer that is copied to the device at every step.
STEP_INPUTS = ("positions", "cached", "table_rows", "slots", "tokens")
CHUNK_INPUTS = ("position", "count", "table_row")  # of a chunk of one prompt, likewise
_MOST_CHUNK = 2048  # tokens
_LEAST_CAPABILITY = (8, 0)  # of the GEMM path: cp.async
_STAGING = 4 << 20  # bytes after the weights at least, where loading stages what it prepacks


class SandboxKernels:
    """The kernels of one model, cache and chip.

    Args:
        head: format of the LM head.
        same_width: every step has the greatest width, padded: a token's bits then do not depend on how many others are
            in the step, and prompts have no chunks of their own. Otherwise a step takes the smallest width, and the
            order of sums depends on it.

    Attributes:
        prefill: the kernels of chunks; None without them.

    Raises:
        BackendError: one token's activations do not fit into the chip's shared memory.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        chip: Chip,
        sizes: CacheSizes,
        *,
        head: WeightFormat = FP8_E4M3,
        same_width: bool = False,
    ) -> None:
        self.geometry, self.chip, self.sizes, self.head = geometry, chip, sizes, head
        self.layouts = projection_layouts(geometry, chip, head=head)
        self.projections = Projections(geometry, chip, self.layouts, chip.dependent_launch)
        self.widths = fitting_widths(GEMV_WIDTHS, self._shared_bytes, geometry, chip)[-1 if same_width else 0 :]
        self.prefill: PrefillKernels | None = None
        if not same_width and chip.capability >= _LEAST_CAPABILITY and sizes.longest > self.widths[-1]:
            self.prefill = PrefillKernels(
                geometry,
                chip,
                self.layouts,
                chunk=min(_MOST_CHUNK, sizes.longest),
                dependent=chip.dependent_launch,
                separate_rope=False,
            )

    @property
    def prefill_chunk(self) -> int:
        """The most tokens of a prompt that a step takes by itself; 0: prompts are parts of other steps."""
        return 0 if self.prefill is None else min(_MOST_CHUNK, self.sizes.longest)

    # --- shapes ------------------------------------------------------------------------------------------------------

    def layout_of(self, part: str) -> PrepackedLayout:
        """The prepacked layout of a part of the checkpoint, such as ``layer.3.qkv``."""
        return self.layouts[kind_of(part)]

    def width_for(self, tokens: int) -> int:
        """The GEMV width that so many tokens are padded to."""
        return next(width for width in self.widths if width >= tokens)

    def attention_shape(self, width: int) -> AttentionShape:
        """How one token's attention is cut in a step of this width: about a CTA per SM in all."""
        g = self.geometry
        splits = max(1, choose_kv_splits(g.heads, g.kv_heads, 1, self.chip.sms) // width)
        return AttentionShape(g.heads, g.kv_heads, g.head_dim, 1, self.layouts["o"].padded_in_features, splits)

    def _shared_bytes(self, width: int) -> int:
        return max(self.projections.shared_bytes(width), self.attention_shape(width).shared_bytes)

    # --- memory ------------------------------------------------------------------------------------------------------

    def plan(self, vectors: dict[str, int], projections: list[str]) -> MemoryPlan:
        """Everything on the device.

        Args:
            vectors: sizes of norms by name. projections: names of the checkpoint's parts that are matrices.
        """
        g, most, prefill = self.geometry, self.widths[-1], self.prefill
        rows = most if prefill is None else prefill.capacity
        shapes = {width: self.attention_shape(width) for width in self.widths}

        def padded(width: int) -> int:
            return -(-width // GROUP) * GROUP

        def buffer(pool: Pool, name: str, dtype: str, *shape: int) -> Buffer:
            return Buffer(pool, name, shape, dtype)

        buffers = [
            *(buffer("weights", part, "uint32", self.layout_of(part).words) for part in projections),
            *(buffer("weights", name, "float32", size) for name, size in vectors.items()),
            # One KV block more than sequences have: padding tokens write there.
            paged_cache_buffer(g.layers, self.sizes.slots + max(self.sizes.block_sizes), g.kv_dim, KV_FLOAT16.dtype),
            buffer("activations", "step", "int64", len(STEP_INPUTS), most),
            buffer("activations", "block_table", "int32", self.sizes.sequences + 1, self.sizes.table_width),
            buffer("activations", "residual", "float32", rows, g.hidden),
            buffer("activations", "x_norm", "float16", most, padded(g.hidden)),
            buffer("activations", "q", "float16", rows, g.q_dim),
            buffer("activations", "attn_out", "float16", most, padded(g.q_dim)),
            buffer("activations", "intermediate", "float16", most, padded(g.ffn)),
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
        if prefill is not None:
            buffers += _chunk_buffers(prefill, self.sizes.longest, g.kv_dim)
        return plan_memory(buffers)

    # --- kernels -----------------------------------------------------------------------------------------------------

    @cached_property
    def planned(self) -> dict[str, Planned]:
        """All kernels by name; those of a GEMV width are called ``<kind>_x<width>``."""
        chip = self.chip
        kernels = [
            prepack_kernel(chip.fp8_converter),
            argmax_kernel(self.geometry.vocabulary, chip.sms, chip.dependent_launch),
            self._attention(1, "single", None),
            self.projections.kernel("qkv", 1, make_qkv, "qkv_single_x1"),  # one position for RoPE and cache
        ]
        if not self.head.scaled:
            kernels.append(prepack_fp16_kernel())
        for width in self.widths:
            kernels.append(embed_kernel(self.layouts["embedding"], width))
            kernels += [self.projections.kernel(kind, width, make_paged_qkv) for kind in PROJECTIONS]
            kernels.append(self._attention(width, "static", Paging(width, 0, self.sizes.capacity)))
            for size in self.sizes.block_sizes:
                kernels.append(self._attention(width, f"paged{size}", Paging(width, size, self.sizes.table_width)))
        return {kernel.spec.name: kernel for kernel in kernels}

    def chunk_kernels(self, block_size: int) -> list[Planned]:
        """The kernels of chunks that depend on the block size: ``gather_blocks<size>`` and ``scatter_blocks<size>``."""
        kv_dim, stride = self.geometry.kv_dim, self.sizes.table_width
        return copy_blocks_kernels(kv_dim, block_size, stride, self.chip.sms, dependent=self.chip.dependent_launch)

    def _attention(self, width: int, form: str, paging: Paging | None) -> Planned:
        name, shape, dependent = f"attention_{form}_x{width}", self.attention_shape(width), self.chip.dependent_launch
        if paging is None:
            return attention_kernel(name, shape, dependent=dependent)
        return paged_attention_kernel(name, shape, paging, dependent=dependent)


def _chunk_buffers(prefill: PrefillKernels, longest: int, kv_dim: int) -> list[Buffer]:
    """What a chunk of one prompt needs beside the buffers of other steps. `longest`: positions of a sequence."""
    sums, partials, counters = prefill.scratch
    own = [Buffer("activations", f"chunk.{name}", (longest, kv_dim), KV_FLOAT16.dtype) for name in ("keys", "values")]
    return [
        Buffer("activations", "chunk.inputs", (len(CHUNK_INPUTS), 1), "int64"),
        Buffer("activations", "chunk.tokens", (prefill.capacity,), "int32"),
        *(Buffer("activations", f"tiles.{name}", (x.words,), "uint32") for name, x in prefill.tiles.items()),
        *own,
        Buffer("workspace", "prefill.sums", (sums,), "float32"),
        Buffer("workspace", "prefill.partials", (partials,), "float32"),
        Buffer("workspace", "prefill.counters", (counters,), "uint32"),
    ]
