"""What the CUDA backend keeps in its one block of memory."""

from dataclasses import asdict
from typing import Any

from numba_atomflow.backends.cuda.decode_path import kernels_for
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.persistent import persistent_buffers
from numba_atomflow.checkpoint.format import HeadFormat, fusion
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.memory.plan import Buffer, MemoryPlan, plan_memory
from numba_atomflow.model.step import StepSizes, step_buffers
from numba_atomflow.ops.cuda.runtime.chip import chip_of

SMALLEST_STAGING = 4 << 20  # bytes behind the weights, where loading puts what it repacks


def cuda_plan(kernels: ModelKernels, max_seq_len: int) -> MemoryPlan:
    """Weights in fragment order, float16 KV cache and activations, and what sampling keeps between tokens."""
    g, block = kernels.geometry, kernels.block
    sizes = StepSizes(
        max_seq_len=max_seq_len,
        step_tokens=block,
        head_rows=block,
        activation="float16",
        cache="float16",
        pad_multiple=GROUP,
        spare_positions=block - 1,  # of the padding tokens
        keep_qkv=kernels.rotates_apart,
    )
    attentions = [kernels.attention_shape(columns) for columns in kernels.widths]
    buffers = [
        *weight_buffers(kernels),
        *step_buffers(g, sizes),
        Buffer("workspace", "attention.partials", (max(shape.partials for shape in attentions),), "float32"),
        Buffer("workspace", "attention.counters", (max(shape.work_tiles for shape in attentions),), "uint32"),
        Buffer("workspace", "sampling.seen", (-(-g.vocabulary // 32),), "uint32"),
        Buffer("workspace", "sampling.options", (5,), "float64"),
        Buffer("workspace", "sampling.generator", (2,), "uint64"),
        Buffer("workspace", "sampling.best", (1,), "int64"),
        Buffer("workspace", "sampling.count", (1,), "int64"),
    ]
    if kernels.persistent:
        buffers += persistent_buffers(kernels.persistent_shape)
    spent = sum(buffer.nbytes for buffer in buffers if buffer.pool != "weights")
    if spent < SMALLEST_STAGING:
        buffers.append(Buffer("workspace", "staging", (SMALLEST_STAGING - spent,), "uint8"))
    return plan_memory(buffers)


def plan_for_this_gpu(geometry: ModelGeometry, head: HeadFormat, max_seq_len: int) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan that loading would carry out, and the GPU: name, memory and free memory in bytes, how it would decode.

    Raises:
        BackendError: there is no usable GPU.
    """
    with DeviceResources() as owner:
        device = owner.open()
        kernels, path = kernels_for(geometry, chip_of(device), head, "auto")
        record = {"name": device.name, "memory_bytes": device.memory_bytes, "free_bytes": device.free_bytes()}
        record["decode"] = asdict(path)
        return cuda_plan(kernels, max_seq_len), record


def weight_buffers(kernels: ModelKernels) -> list[Buffer]:
    """One buffer for each projection, in fragment order, and for each vector; named as parts of the checkpoint."""
    shapes = kernels.geometry.parameters()
    buffers = []
    for part, theirs in fusion(kernels.geometry).items():
        if len(shapes[theirs[0]]) == 1:
            rows = sum(shapes[name][0] for name in theirs)
            buffers.append(Buffer("weights", part, (rows,), "float32"))
        else:
            buffers.append(Buffer("weights", part, (kernels.layout_of(part).words,), "uint32"))
    return buffers
