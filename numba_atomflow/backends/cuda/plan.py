"""What the CUDA backend keeps in its arena: its one allocation of device memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Self

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.backends.cuda.families import beyond_gemm, check_vocabulary, sliding_window
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.persistent import persistent_buffers, verification_buffers
from numba_atomflow.backends.cuda.prefill_path import choose_prefill_path, most_chunk_tokens
from numba_atomflow.checkpoint.format import fusion
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.memory.plan import Buffer, MemoryPlan, plan_memory
from numba_atomflow.memory.view import View
from numba_atomflow.model.buffers import StepSizes, step_buffers
from numba_atomflow.model.formats import GPU_KV, HeadFormat
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.chip import chip_of
from numba_atomflow.ops.cuda.token.sample import LAYOUT

MIN_STAGING_BYTES = 4 << 20  # of memory after the weights, where loading stages what it prepacks


class SamplingState(NamedTuple):
    """What sampling keeps on the device between tokens.

    Attributes:
        seen: uint32 bitmap of the tokens in the context.
        options: float64: temperature, top-k, top-p, min-p, repetition penalty.
        generator: uint64: seed, and the number of draws so far.
        best: int64: the arg-max so far, as a key that orders by logit and then by token id.
        sums: int64: where the CTAs of the sampling kernel add up; zero between its launches.
        tokens_posted: int64: tokens posted to the host so far.
    """

    seen: View
    options: View
    generator: View
    best: View
    sums: View
    tokens_posted: View

    @staticmethod
    def plan(vocabulary: int) -> list[Buffer]:
        """The buffers of these views.

        Raises:
            BackendError: the vocabulary is too large.
        """
        check_vocabulary(vocabulary)
        sizes = {
            "seen": (-(-vocabulary // 32), "uint32"),
            "options": (5, "float64"),
            "generator": (2, "uint64"),
            "best": (1, "int64"),
            "sums": (LAYOUT.sums_words, "int64"),
            "tokens_posted": (1, "int64"),
        }
        return [Buffer("workspace", f"sampling.{name}", (size,), dtype) for name, (size, dtype) in sizes.items()]

    @classmethod
    def of(cls, buffers: Mapping[str, View]) -> Self:
        """The views of an arena."""
        return cls(*(buffers[f"sampling.{name}"] for name in cls._fields))


class AttentionScratch(NamedTuple):
    """What the CTAs of split-KV attention exchange.

    Attributes:
        partials: float32 results of the splits. counters: uint32, splits that are done, for each work tile.
    """

    partials: View
    counters: View

    @staticmethod
    def plan(shapes: Sequence[AttentionShape]) -> list[Buffer]:
        """The buffers of these views, large enough for each of the shapes."""
        return [
            Buffer("workspace", "attention.partials", (max(shape.partials for shape in shapes),), "float32"),
            Buffer("workspace", "attention.counters", (max(shape.work_tiles for shape in shapes),), "uint32"),
        ]

    @classmethod
    def of(cls, buffers: Mapping[str, View]) -> Self:
        """The views of an arena."""
        return cls(*(buffers[f"attention.{name}"] for name in cls._fields))


class PrefillScratch(NamedTuple):
    """What the CTAs of a kernel of the GEMM path exchange where several compute one tile. All kernels take the same.

    Attributes:
        sums: float32 partial sums of projections; 0 before and after every kernel.
        partials: float32 results of attention. counters: uint32, CTAs that are done, for each tile of it; 0 before and
            after every kernel.
    """

    sums: View
    partials: View
    counters: View

    @staticmethod
    def plan(sums: int, partials: int, counters: int) -> list[Buffer]:
        """The buffers of these views."""
        return [
            Buffer("workspace", "prefill.sums", (sums,), "float32"),
            Buffer("workspace", "prefill.partials", (partials,), "float32"),
            Buffer("workspace", "prefill.counters", (counters,), "uint32"),
        ]

    @classmethod
    def of(cls, buffers: Mapping[str, View]) -> Self:
        """The views of an arena."""
        return cls(*(buffers[f"prefill.{name}"] for name in cls._fields))


def cuda_plan(kernels: ModelKernels, max_seq_len: int) -> MemoryPlan:
    """Prepacked weights, float16 KV cache and activations, and what sampling keeps between tokens."""
    g = kernels.geometry
    width, prefill = kernels.gemv_width, kernels.prefill
    sizes = StepSizes(
        max_seq_len=max_seq_len,
        # The LM head reads a whole GEMV width of rows, wherever it begins.
        step_tokens=width if prefill is None else prefill.capacity + width,
        input_tokens=width,
        head_rows=kernels.head_rows,
        activation="float16",
        cache=GPU_KV,
        pad_multiple=GROUP,
        spare_positions=width - 1,  # of the padding tokens of GEMV kernels
        keep_qkv=kernels.separate_rope_kernel,
        keep_gate_up=prefill is not None,
    )
    buffers = [
        *weight_buffers(g, kernels.layout_of),
        *step_buffers(g, sizes),
        *AttentionScratch.plan([kernels.attention_shape(width) for width in kernels.gemv_widths]),
        *SamplingState.plan(g.vocabulary),
    ]
    if prefill is not None:
        buffers.append(Buffer("activations", "count", (1,), "int64"))
        buffers += [Buffer("activations", f"tiles.{name}", (x.words,), "uint32") for name, x in prefill.tiles.items()]
        buffers += PrefillScratch.plan(*prefill.scratch)
    if kernels.persistent:
        buffers += persistent_buffers(kernels.persistent_shape)
        buffers += verification_buffers(kernels.wide_shapes, g.vocabulary)
    return plan_memory(with_staging(buffers))


def plan_for_this_gpu(geometry: ModelGeometry, head: HeadFormat, max_seq_len: int) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan that loading would execute, and the GPU: name, memory and free memory in bytes, its paths.

    Raises:
        BackendError: there is no usable GPU, or it has no kernels for the model.
    """
    window = sliding_window(geometry, max_seq_len)
    with DeviceResources() as owner:
        device = owner.open()
        chip = chip_of(device)
        prefill = choose_prefill_path("auto", chip, max_seq_len, beyond_gemm=beyond_gemm(geometry))
        chunk = most_chunk_tokens(prefill, None, max_seq_len)
        kernels, decode = kernels_for(geometry, chip, head, "auto", chunk=chunk, window=window)
        record = {"name": device.name, "memory_bytes": device.memory_bytes, "free_bytes": device.free_bytes()}
        record |= {"decode": asdict(decode), "prefill": asdict(prefill)}
        return cuda_plan(kernels, max_seq_len), record


def weight_buffers(geometry: ModelGeometry, layout_of: Callable[[str], PrepackedLayout]) -> list[Buffer]:
    """One buffer for each projection, prepacked, and for each vector; named as parts of the checkpoint."""
    shapes = geometry.parameters()
    buffers = []
    for part, tensors in fusion(geometry).items():
        if len(shapes[tensors[0]]) == 1:
            rows = sum(shapes[name][0] for name in tensors)
            buffers.append(Buffer("weights", part, (rows,), "float32"))
        else:
            buffers.append(Buffer("weights", part, (layout_of(part).words,), "uint32"))
    return buffers


def with_staging(buffers: list[Buffer]) -> list[Buffer]:
    """The buffers, and as much more as loading needs beside the weights to stage what it prepacks."""
    rest = sum(buffer.nbytes for buffer in buffers if buffer.pool != "weights")
    if rest >= MIN_STAGING_BYTES:
        return buffers
    return [*buffers, Buffer("workspace", "staging", (MIN_STAGING_BYTES - rest,), "uint8")]
