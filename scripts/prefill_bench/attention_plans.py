"""The plans of prefill attention that are measured: the engine's, and others that it could be replaced by."""

from dataclasses import replace

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.ops.cuda.attention.prefill import prefill_attention_kernel
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan, choose_prefill_attention_plan
from numba_atomflow.ops.cuda.gemm.plan import MOST_PADDING
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from prefill_bench.expectations import CHUNK


def attention_plan(geometry: ModelGeometry, chip: Chip) -> PrefillAttentionPlan:
    """The engine's plan for its chunks."""
    g, out = geometry, ActivationTiles(geometry.q_dim, CHUNK + MOST_PADDING)
    return choose_prefill_attention_plan(g.heads, g.kv_heads, g.head_dim, out, chip)


def other_plans(plan: PrefillAttentionPlan) -> dict[str, PrefillAttentionPlan]:
    """By name, plans with wgmma that the engine's could be replaced by, and the one with mma.sync."""
    if plan.instructions != "wgmma":
        return {}
    found = {"without turns": replace(plan, turns=False), "64 queries": replace(plan, query_tile=64)}
    for key_block, stages in ((128, 2), (144, 2), (160, 2), (176, 2)):
        found[f"{key_block} keys, {stages} stages"] = replace(plan, key_block=key_block, stages=stages)
    found["mma.sync"] = replace(plan, instructions="mma", query_tile=64, key_block=64, stages=1)
    return found


def attention_kernel(plan: PrefillAttentionPlan, chip: Chip) -> Planned:
    """The engine's kernel, which is in the compile cache under this name."""
    return prefill_attention_kernel("attention_chunk", plan, chip.dependent_launch)
