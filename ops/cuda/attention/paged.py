"""Grouped-query attention of up to 8 tokens, each of any sequence, over a paged float16 KV cache."""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.shape import AttentionShape, Paging
from numba_atomflow.ops.cuda.attention.split_kv import make_attend
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, U32, Planned, kernel_spec


def paged_attention_kernel(name: str, shape: AttentionShape, paging: Paging, *, dependent: bool) -> Planned:
    """The kernel of `make_paged_attention`."""
    signature = (U32, U32, U32, I64, I64, I64, I32, F32, U32, U32)
    options = {"shape": shape, "paging": paging, "dependent": dependent}
    spec = kernel_spec(name, make_paged_attention, signature, shape.threads, shape.shared_bytes, **options)
    return Planned(spec, paging.tokens * shape.ctas)


def make_paged_attention(shape: AttentionShape, paging: Paging, *, dependent: bool = False) -> Any:
    """Kernel for `paging.tokens` times the CTAs of `shape`, which says how the work for one token is cut.

    Arguments, one-dimensional: q uint32 pairs of float16 [tokens, heads * head_dim]; keys and values uint32 pairs of
    float16 [slots, kv_heads * head_dim]; positions int64 [tokens]; known int64 [tokens], positions of the token's
    sequence that earlier steps have written; rows int64 [tokens], of the page table; pages int32 [rows, stride],
    blocks in the order of positions; partials and counters, `tokens` times those of `shape`; out uint32 pairs of
    float16 [tokens, out_width].
    """
    if shape.tokens != 1:
        raise ValueError("the shape is that of one token")
    attend = make_attend(shape, paging, dependent)

    @ptx.kernel(shape.threads, 1)
    def paged_attention(q, keys, values, positions, known, rows, pages, partials, counters, out):
        attend(q, keys, values, positions, known, rows, pages, partials, counters, out)

    return paged_attention
