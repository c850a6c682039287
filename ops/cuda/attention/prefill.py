"""Causal grouped-query attention of a prefill chunk over a contiguous float16 KV cache (prefill_plan.py)."""

from dataclasses import replace
from typing import NamedTuple

from numba_atomflow.ops.cuda.attention.prefill_mma import make_prefill_attention_mma
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.attention.prefill_wgmma import make_prefill_attention_wgmma
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U16, U32, Planned, kernel_spec


class PrefillAttentionArguments(NamedTuple):
    """The kernel's parameter. All arrays are one-dimensional.

    Attributes:
        q: bits of float16 [tokens, heads * head_dim]; rows beyond `count` are not read.
        keys, values: bits of float16 [positions, kv_heads * head_dim]; all tokens of the chunk are in them already.
            What lies behind the last token is not read.
        position: [1], of the first token; the others follow.
        count: [1], tokens of the chunk.
        partials: [plan.partials], scratch.
        counters: [plan.counters], zero before the first launch; every launch leaves them zero.
        out: tiled activations, x of the o projection. Rows beyond `count` and the padding of K are not written.
    """

    q: U16
    keys: U16
    values: U16
    position: I64
    count: I64
    partials: F32
    counters: U32
    out: U32


def prefill_attention_kernel(name: str, plan: PrefillAttentionPlan, dependent: bool) -> Planned:
    """The kernel of a plan. Each launch has its own grid: `plan.ctas(tokens)`."""
    wgmma = plan.instructions == "wgmma"
    factory = make_prefill_attention_wgmma if wgmma else make_prefill_attention_mma
    options = {"plan": plan, "dependent": dependent}
    spec = kernel_spec(name, factory, PrefillAttentionArguments, plan.threads, plan.shared_bytes, **options)
    return Planned(replace(spec, arch_specific=wgmma, whole_carveout=wgmma), 0)
