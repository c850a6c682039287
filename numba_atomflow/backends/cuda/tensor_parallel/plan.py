"""What each rank keeps in its arena."""

from dataclasses import asdict
from typing import Any

from numba_atomflow.backends.base import DecodePath, PrefillPath
from numba_atomflow.backends.cuda.families import check_no_window
from numba_atomflow.backends.cuda.persistent import persistent_buffers, verification_buffers
from numba_atomflow.backends.cuda.plan import SamplingState, with_staging
from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels
from numba_atomflow.device.resources import DeviceResources
from numba_atomflow.geometry import GROUP, ModelGeometry
from numba_atomflow.memory.plan import MemoryPlan, plan_memory
from numba_atomflow.model.buffers import StepSizes, step_buffers
from numba_atomflow.model.formats import GPU_KV, HeadFormat
from numba_atomflow.model.sharding import Sharding
from numba_atomflow.ops.cuda.runtime.chip import chip_of

DECODE = DecodePath("persistent")


def prefill_path(kernels: RankKernels) -> PrefillPath:
    """How prompts run."""
    tokens = kernels.most_columns
    at_a_time = "one token at a time" if tokens == 1 else f"up to {tokens} tokens at a time"
    return PrefillPath("gemv", f"several GPUs run prompts in decode steps, {at_a_time}")


def step_sizes(kernels: RankKernels, max_seq_len: int) -> StepSizes:
    """Sizes of a step of one token, and of the KV cache, which has room for the padding of steps of several."""
    return StepSizes(
        max_seq_len=max_seq_len,
        step_tokens=1,
        head_rows=1,
        activation="float16",
        cache=GPU_KV,
        pad_multiple=GROUP,
        spare_positions=kernels.most_columns - 1,
        keep_qkv=False,
    )


def rank_plan(kernels: RankKernels, max_seq_len: int) -> MemoryPlan:
    """A rank's rows of the weights, its heads' KV cache, and activations; the same sizes on every rank.

    The residual stream and the logits are whole on every rank; of q, attn_out and intermediate each has its own part.
    """
    buffers = [
        *kernels.weight_buffers,
        *step_buffers(kernels.sharding.rank_geometry, step_sizes(kernels, max_seq_len)),
        *SamplingState.plan(kernels.geometry.vocabulary),
        *persistent_buffers(kernels.persistent_shape),
        *verification_buffers(kernels.wide_shapes, kernels.geometry.vocabulary),
    ]
    return plan_memory(with_staging(buffers))


def plan_for_gpus(
    geometry: ModelGeometry, head: HeadFormat, max_seq_len: int, gpus: int
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The plan of each of so many GPUs like the first of this machine, and a record of that one: name, memory and free
    memory in bytes, how it runs decode steps and prompts.

    Raises:
        OptionError: they cannot share the model.
        BackendError: there is no usable GPU, or it has no kernels for the model.
    """
    check_no_window(geometry, max_seq_len)
    sharding = Sharding(geometry, gpus)
    with DeviceResources() as owner:
        device = owner.open()
        kernels = RankKernels(sharding, chip_of(device), head)
        record = {"name": device.name, "memory_bytes": device.memory_bytes, "free_bytes": device.free_bytes()}
        record |= {"decode": asdict(DECODE), "prefill": asdict(prefill_path(kernels))}
        return rank_plan(kernels, max_seq_len), record
