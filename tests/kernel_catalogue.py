"""The kernels of Llama 3.2 3B's decode step and of its prompts (8 tokens at a time), ready to be compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba.cuda import types

from numba_atomflow.ops.cuda import attention, embedding, fragments, projection_kernels, sample
from numba_atomflow.ops.cuda.fragments import FragmentLayout
from numba_atomflow.ops.cuda.projection import ProjectionShape, choose_shape

MULTIPROCESSORS = 132  # of an H200
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 3072, 24, 8, 128, 8192, 128256
EPS = 1e-5

U8, U16, U32, U64 = (getattr(types, f"uint{bits}")[::1] for bits in (8, 16, 32, 64))
I32, I64, F32, F64 = types.int32[::1], types.int64[::1], types.float32[::1], types.float64[::1]


@dataclass(frozen=True)
class Entry:
    """A kernel.

    Attributes:
        build: makes it, given whether to decode FP8 by conversion (`decodes` says whether that makes a difference).
        weights: it streams weights. doubles: it may use float64.
    """

    name: str
    build: Callable[[bool], Any]
    signature: tuple[Any, ...]
    weights: bool = False
    doubles: bool = False

    @property
    def decodes(self) -> bool:
        return self.weights or self.name in {"repack", "embedding"}


def shape(rows: int, columns: int, half: int, tokens: int, hardware_fp8: bool) -> ProjectionShape:
    return choose_shape(FragmentLayout(rows, columns, half, hardware_fp8), tokens, MULTIPROCESSORS)


def projections(tokens: int) -> list[Entry]:
    qkv_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM

    def qkv(hardware: bool) -> Any:
        cut = shape(qkv_rows, HIDDEN, HEAD_DIM // 2, tokens, hardware)
        return projection_kernels.make_qkv(cut, EPS, HEADS, KV_HEADS)

    def o(hardware: bool) -> Any:
        return projection_kernels.make_add(shape(HIDDEN, HEADS * HEAD_DIM, 0, tokens, hardware))

    def gate_up(hardware: bool) -> Any:
        return projection_kernels.make_swiglu(shape(2 * FFN, HIDDEN, FFN, tokens, hardware), EPS, FFN)

    def down(hardware: bool) -> Any:
        return projection_kernels.make_add(shape(HIDDEN, FFN, 0, tokens, hardware))

    return [
        Entry(f"qkv x{tokens}", qkv, (U32, U32, F32, U32, I64, F32, F32, U16, U16, U16), weights=True),
        Entry(f"o x{tokens}", o, (U32, U32, F32), weights=True),
        Entry(f"gate_up x{tokens}", gate_up, (U32, U32, F32, U32, U16), weights=True),
        Entry(f"down x{tokens}", down, (U32, U32, F32), weights=True),
    ]


def vocabulary(hardware: bool) -> Any:
    return projection_kernels.make_store(shape(VOCABULARY, HIDDEN, 0, 1, hardware), EPS)


def attend(heads: int, kv_heads: int, head_dim: int, tokens: int) -> Entry:
    splits = attention.choose_splits(heads, kv_heads, tokens, MULTIPROCESSORS)
    cut = attention.AttentionShape(heads, kv_heads, head_dim, tokens, heads * head_dim, splits)
    name = f"attention {heads}/{kv_heads} of {head_dim} x{tokens}"
    return Entry(name, lambda _: attention.make_attention(cut), (U32, U32, U32, I64, F32, U32, U32))


CATALOGUE = (
    *projections(1),
    *(entry for entry in projections(8) if entry.name in {"qkv x8", "gate_up x8"}),
    Entry("vocabulary x1", vocabulary, (U32, U32, F32, U32, F32), weights=True),
    attend(HEADS, KV_HEADS, HEAD_DIM, 1),
    attend(HEADS, KV_HEADS, HEAD_DIM, 8),
    attend(32, 32, 80, 1),
    Entry(
        "repack", lambda hardware: fragments.make_repack(FragmentLayout(2 * FFN, HIDDEN, FFN, hardware)), (U8, F32, U32)
    ),
    Entry(
        "embedding",
        lambda hardware: embedding.make_embed(FragmentLayout(VOCABULARY, HIDDEN, 0, hardware), 1),
        (U32, I32, F32),
    ),
    Entry("argmax", lambda _: sample.make_argmax(VOCABULARY), (F32, U32, F64, I64)),
    Entry("sample", lambda _: sample.make_sample(VOCABULARY), (F32, U32, F64, U64, I64, I32, I32), doubles=True),
    Entry("advance", lambda _: sample.make_advance(1, 1024, sampled=True), (I32, I32, I64, U32, I32, I64)),
)
