"""Grouped-query attention of 1 to 8 tokens of one sequence over a contiguous float16 KV cache (split_kv.py)."""

from typing import Any, NamedTuple

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.attention.split_kv import KvAddressing, make_attend
from numba_atomflow.ops.cuda.runtime.spec import F32, I64, U32, Planned, kernel_spec
from numba_atomflow.ops.cuda.scalars import i32


class AttentionArguments(NamedTuple):
    """The kernel's parameter. All arrays are one-dimensional.

    Attributes:
        q: pairs of float16 [tokens, heads * head_dim].
        keys, values: pairs of float16 [positions, kv_heads * head_dim]; all tokens of the step are in them already.
        position: [1], of the first token.
        partials: [shape.partials], scratch.
        counters: [shape.work_tiles], zero before the first launch; every launch leaves them zero.
        out: pairs of float16 [tokens, out_width].
    """

    q: U32
    keys: U32
    values: U32
    position: I64
    partials: F32
    counters: U32
    out: U32


def make_attention(shape: AttentionShape, *, dependent: bool = False) -> Any:
    """Kernel (`AttentionArguments`). Launch: `shape.ctas` CTAs of `shape.threads` threads with `shape.shared_bytes` of
    dynamic shared memory.
    """
    attend = make_attend(shape, _contiguous(), dependent)

    @ptx.kernel(shape.threads, 1)
    def attention(io):
        attend(io)

    return attention


def _contiguous() -> KvAddressing:
    """The position of a key is its row in the cache."""

    @ptx.device_function
    def sequence_start(io, sequence):
        return i32(0)

    @ptx.device_function
    def find_page(io, sequence_start, key):
        return sequence_start

    @ptx.device_function
    def row_of(page, key):
        return key

    @ptx.device_function
    def position(io, sequence):
        return io.position[0]

    return KvAddressing(
        batch=0,
        same_page=False,
        sequence_start=sequence_start,
        find_page=find_page,
        row_of=row_of,
        position=position,
        cached=position,
    )


def attention_kernel(name: str, shape: AttentionShape, *, dependent: bool) -> Planned:
    """The kernel of `make_attention`."""
    options = {"shape": shape, "dependent": dependent}
    spec = kernel_spec(name, make_attention, AttentionArguments, shape.threads, shape.shared_bytes, **options)
    return Planned(spec, shape.ctas)
