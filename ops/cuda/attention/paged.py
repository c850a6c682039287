"""Grouped-query attention of up to 8 tokens, each of any sequence, over a paged float16 KV cache (split_kv.py).

Only the row of the cache in which a key lies is found in another way than in decode.py. A step of 16 keys begins at a
multiple of 16: its rows take one look-up in the block table, or two for KV blocks of 8.

With `Paging(block_size=0)` every sequence has a contiguous part of the cache, and there is no block table: what the
cost of paging is measured against.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.attention.split_kv import KEYS, KvAddressing, make_attend
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32


@dataclass(frozen=True)
class Paging:
    """Where the sequences of a step lie in the KV cache.

    Attributes:
        tokens: of the step.
        block_size: positions of a KV block, a multiple of 8. 0: no block table; each sequence has `stride` contiguous
            positions.
        stride: entries from one row of the block table to the next; or those positions.
    """

    tokens: int
    block_size: int
    stride: int


class PagedAttentionArguments(NamedTuple):
    """The kernel's parameter. All arrays are one-dimensional.

    Attributes:
        q: pairs of float16 [tokens, heads * head_dim].
        keys, values: pairs of float16 [slots, kv_heads * head_dim]; all tokens of the step are in them already.
        positions: [tokens].
        cached: [tokens], positions of the token's sequence that were in the cache before this step.
        table_rows: [tokens], the sequence's row of the block table.
        block_table: [rows, stride], KV blocks of each sequence in the order of positions.
        partials, counters: as in `AttentionArguments`, for each token.
        out: pairs of float16 [tokens, out_width].
    """

    q: U32
    keys: U32
    values: U32
    positions: I64
    cached: I64
    table_rows: I64
    block_table: I32
    partials: F32
    counters: U32
    out: U32


def make_paged_attention(shape: AttentionShape, paging: Paging, *, dependent: bool = False) -> Any:
    """Kernel (`PagedAttentionArguments`). `shape` is that of one token; launch: `paging.tokens` times its CTAs."""
    if shape.tokens != 1:
        raise ValueError("the shape is that of one token")
    attend = make_attend(shape, _paged(paging), dependent)

    @ptx.kernel(shape.threads, 1)
    def paged_attention(io):
        attend(io)

    return paged_attention


def _paged(paging: Paging) -> KvAddressing:
    """Keys by way of the block table. A page is the slot of its first position. 32 bits, to save registers on sm_80."""
    block_size, stride = paging.block_size, paging.stride

    @ptx.device_function
    def sequence_start(io, sequence):
        return i32(io.table_rows[sequence] * stride)

    @ptx.device_function
    def find_page(io, sequence_start, key):
        return (
            io.block_table[sequence_start + i32(key) // block_size] * block_size if block_size > 0 else sequence_start
        )

    @ptx.device_function
    def row_of(page, key):
        return int64(page + i32(key) % block_size) if block_size > 0 else page + key

    @ptx.device_function
    def position(io, sequence):
        return io.positions[sequence]

    @ptx.device_function
    def cached(io, sequence):
        return io.cached[sequence]

    return KvAddressing(
        batch=paging.tokens,
        same_page=block_size % KEYS == 0,
        sequence_start=sequence_start,
        find_page=find_page,
        row_of=row_of,
        position=position,
        cached=cached,
    )


def paged_attention_kernel(name: str, shape: AttentionShape, paging: Paging, *, dependent: bool) -> Planned:
    """The kernel of `make_paged_attention`."""
    options = {"shape": shape, "paging": paging, "dependent": dependent}
    spec = kernel_spec(
        name, make_paged_attention, PagedAttentionArguments, shape.threads, shape.shared_bytes, **options
    )
    return Planned(spec, paging.tokens * shape.ctas)
