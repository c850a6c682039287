"""Grouped-query attention of 1 to 8 tokens of one sequence over a contiguous float16 KV cache."""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.attention.split_kv import make_attend
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U32, Planned, kernel_spec


def attention_kernel(name: str, shape: AttentionShape, *, dependent: bool) -> Planned:
    """The kernel of `make_attention`."""
    signature = (U32, U32, U32, I64, F32, U32, U32)
    spec = kernel_spec(
        name, make_attention, signature, shape.threads, shape.shared_bytes, shape=shape, dependent=dependent
    )
    return Planned(spec, shape.ctas)


def make_attention(shape: AttentionShape, *, dependent: bool = False) -> Any:
    """Kernel for `shape.ctas` CTAs of `shape.threads` threads with `shape.shared_bytes` of shared memory.

    Arguments, one-dimensional: q uint32 pairs of float16 [tokens, heads * head_dim]; keys and values uint32 pairs of
    float16 [positions, kv_heads * head_dim]; position int64 [1], of the first token (all tokens are in the cache
    already); partials float32 [shape.partials]; counters uint32 [shape.work_tiles], zero before the first launch; out
    uint32 pairs of float16 [tokens, out_width].
    """
    attend = make_attend(shape, None, dependent)

    @ptx.kernel(shape.threads, 1)
    def attention(q, keys, values, position, partials, counters, out):
        attend(q, keys, values, position, position, position, position, partials, counters, out)

    return attention
