"""The paged kernels against their references and against the contiguous ones, in the simulator and on a GPU."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from kernel_cases import (
    EPS,
    ProjectionCase,
    as_words,
    generator,
    launch,
    poisoned,
    qkv_case,
    relative_error,
    weights,
    within,
)
from numpy.typing import NDArray

from numba_atomflow.ops.cuda.attention.copy_blocks import (
    THREADS,
    CopyBlocksArguments,
    make_gather_blocks,
    make_scatter_blocks,
)
from numba_atomflow.ops.cuda.attention.decode import AttentionArguments, make_attention
from numba_atomflow.ops.cuda.attention.paged import PagedAttentionArguments, Paging, make_paged_attention
from numba_atomflow.ops.cuda.attention.shape import AttentionShape
from numba_atomflow.ops.cuda.gemv.kernels import PagedQkvArguments, QkvArguments, make_paged_qkv, make_qkv
from numba_atomflow.ops.cuda.layout.weights import prepack_reference
from numba_atomflow.ops.paged_attention import attend_paged_reference
from numba_atomflow.ops.rope import rope_table


@dataclass(frozen=True)
class PagedCase:
    """Tokens of one step. `lengths`: what each sees, itself included; equal `rows` are tokens of one sequence."""

    head_dim: int
    heads: int
    kv_heads: int
    block_size: int  # 0: contiguous
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()
    splits: int = 1
    warps: int = 1

    @property
    def shape(self) -> AttentionShape:
        width = self.heads * self.head_dim + 16
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, 1, width, self.splits, self.warps)

    @property
    def row_of(self) -> tuple[int, ...]:
        return self.rows or tuple(range(len(self.lengths)))


PAGED = (
    PagedCase(64, 3, 1, 8, (23, 1, 9)),
    PagedCase(64, 3, 1, 16, (17, 33), splits=3),
    PagedCase(80, 2, 2, 32, (20,)),
    PagedCase(96, 4, 1, 8, (33, 40), splits=2, warps=2),
    PagedCase(128, 8, 1, 64, (40, 7), splits=3),
    PagedCase(64, 2, 1, 128, (5, 6, 7), rows=(1, 1, 1)),  # a prompt's chunk
    PagedCase(64, 2, 1, 0, (21, 8), splits=2),
)


@lru_cache(maxsize=2)
def _kernels(case: PagedCase, stride: int) -> tuple[Any, Any]:
    paging = Paging(len(case.lengths), case.block_size, stride)
    return make_paged_attention(case.shape, paging), make_attention(case.shape)


def check_paged_attention(case: PagedCase) -> None:
    """Bit-identical to the contiguous kernel on each token's own keys, for any contents of other slots; relative L2
    error 1e-3 against float64.
    """
    rng = generator(case.head_dim, case.heads, *case.lengths)
    shape, tokens = case.shape, len(case.lengths)
    cache, block_table, slots = scatter(case, rng)
    stride = block_table.shape[1] if case.block_size else len(slots[0])
    paged, contiguous = _kernels(case, stride)
    q = (rng.standard_normal((tokens, case.heads * case.head_dim)) * 2).astype(np.float16)
    positions, rows = np.array(case.lengths, np.int64) - 1, np.array(case.row_of, np.int64)
    out = poisoned(tokens * shape.out_width // 2, dtype=np.uint32)
    counters = np.zeros(tokens * shape.work_tiles, np.uint32)
    launch(
        paged,
        tokens * shape.ctas,
        shape.threads,
        shape.shared_bytes,
        PagedAttentionArguments(
            q=as_words(q),
            keys=as_words(cache[0]),
            values=as_words(cache[1]),
            positions=positions,
            cached=np.zeros(tokens, np.int64),
            table_rows=rows,
            block_table=block_table.reshape(-1),
            partials=poisoned(tokens * shape.partials),
            counters=counters,
            out=out,
        ),
    )
    assert not counters.any(), "a counter is not zero for the next launch"
    got, width = out.view(np.float16).reshape(tokens, -1), case.heads * case.head_dim
    assert np.isnan(got[:, width:]).all(), "wrote into the padding"
    for t, (length, row) in enumerate(zip(case.lengths, case.row_of, strict=True)):
        keys, values = (np.ascontiguousarray(array[slots[row][:length]]) for array in cache)
        alone = poisoned(shape.out_width // 2, dtype=np.uint32)
        arguments = AttentionArguments(
            q=as_words(q[t]),
            keys=as_words(keys),
            values=as_words(values),
            position=positions[t : t + 1],
            partials=poisoned(shape.partials),
            counters=np.zeros(shape.work_tiles, np.uint32),
            out=alone,
        )
        launch(contiguous, shape.ctas, shape.threads, shape.shared_bytes, arguments)
        np.testing.assert_array_equal(got[t, :width], alone.view(np.float16)[:width])
    if case.block_size:
        exact = (array.astype(np.float64) for array in (q, *cache))
        expected = attend_paged_reference(*exact, block_table, rows, positions, case.block_size, case.head_dim)
        within("paged attention", relative_error(got[:, :width], expected), 1e-3)


def scatter(case: PagedCase, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.int32], list[NDArray[Any]]]:
    """A cache [2, slots, kv_dim], NaN in slots that must not be read; the block table; each row's slots in order."""
    longest, rows = max(case.lengths), max(case.row_of) + 1
    size = case.block_size or longest + 3
    blocks = -(-longest // size)  # of a sequence
    order = rng.permutation(rows * blocks + 2)[: rows * blocks].reshape(rows, blocks).astype(np.int32)
    if not case.block_size:
        order = np.arange(rows, dtype=np.int32)[:, None]
    slots = [(order[row, :, None] * size + np.arange(size)).reshape(-1) for row in range(rows)]
    cache = np.full((2, (rows * blocks + 2) * size, case.kv_heads * case.head_dim), np.nan, np.float16)
    for row in set(case.row_of):
        used = max(length for length, other in zip(case.lengths, case.row_of, strict=True) if other == row)
        cache[:, slots[row][:used]] = rng.standard_normal((2, used, cache.shape[2]))
    return cache, order, slots


PAGED_QKV = (
    qkv_case(128, 5, 64, 2, 1, groups_in_flight=1, ctas=3),
    qkv_case(128, 2, 128, 1, 1, groups_in_flight=1, warps=1, split_k=1),
)


def check_paged_qkv(case: ProjectionCase) -> None:
    """Each token is bit for bit what the contiguous kernel computes at that position, in its own slot; nothing else
    is written.
    """
    rng = generator(case.out_features, case.tokens)
    plan, positions_at_all, slots_at_all = case.plan, 20, 32
    dim, q_width, kv_width = case.head_dim, case.heads * case.head_dim, case.kv_heads * case.head_dim
    codes, scales = weights(plan.layout, rng)
    words = prepack_reference(codes, scales, plan.layout)
    residual = rng.standard_normal((case.tokens, case.in_features)).astype(np.float32)
    norm_weight = rng.uniform(0.5, 1.5, case.in_features).astype(np.float32)
    tables = [table.reshape(-1) for table in rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), positions_at_all)]
    positions = rng.integers(0, positions_at_all, case.tokens)
    slots = rng.permutation(slots_at_all)[: case.tokens]
    grid = case.ctas, plan.threads, plan.shared_bytes
    common: dict[str, Any] = {"weights": words, "residual": as_words(residual), "norm_weight": norm_weight}
    common |= {"cosines": tables[0], "sines": tables[1]}

    def outputs(rows: int) -> dict[str, NDArray[Any]]:
        sizes = {"q": case.tokens * q_width, "keys": rows * kv_width, "values": rows * kv_width}
        x_norm = poisoned(case.tokens * plan.layout.padded_in_features // 2, dtype=np.uint32)
        return {name: poisoned(size, dtype=np.uint16) for name, size in sizes.items()} | {"x_norm": x_norm}

    paged = outputs(slots_at_all)
    kernel = make_paged_qkv(plan, EPS, case.heads, case.kv_heads)
    launch(kernel, *grid, PagedQkvArguments(**common, **paged, positions=positions, slots=slots))
    contiguous = make_qkv(plan, EPS, case.heads, case.kv_heads)
    for t, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        first = position - t  # so that token t is at this position
        if not 0 <= first <= positions_at_all - case.tokens:
            continue
        alone = outputs(positions_at_all)
        launch(contiguous, *grid, QkvArguments(**common, **alone, position=np.array([first], np.int64)))
        np.testing.assert_array_equal(paged["q"].reshape(-1, q_width)[t], alone["q"].reshape(-1, q_width)[t])
        for name in ("keys", "values"):
            ours, theirs = paged[name].reshape(-1, kv_width), alone[name].reshape(-1, kv_width)
            np.testing.assert_array_equal(ours[slot], theirs[position])
    untouched = np.setdiff1d(np.arange(slots_at_all), slots)
    for ours in (paged["keys"], paged["values"]):
        assert (ours.reshape(-1, kv_width)[untouched] == 0xFFFF).all(), "wrote into another slot"
        assert (ours.reshape(-1, kv_width)[slots] != 0xFFFF).all()


@dataclass(frozen=True)
class CopyCase:
    """A chunk of `count` tokens from `position` on, of one of three sequences."""

    kv_dim: int
    block_size: int
    position: int
    count: int
    ctas: int = 2


COPIES = (CopyCase(64, 8, 0, 5), CopyCase(24, 16, 19, 14), CopyCase(128, 8, 23, 1, ctas=1))


def check_copy_blocks(case: CopyCase) -> None:
    """Exactly the positions before the chunk are gathered, and exactly those of the chunk are scattered."""
    rng = generator(case.kv_dim, case.position, case.count)
    longest, row = case.position + case.count + 9, 1
    stride = -(-longest // case.block_size) + 1
    table = rng.permutation(3 * stride + 2)[: 3 * stride].reshape(3, stride).astype(np.int32)
    slots = (table[row, :, None] * case.block_size + np.arange(case.block_size)).reshape(-1)
    cache = rng.standard_normal((2, (3 * stride + 2) * case.block_size, case.kv_dim)).astype(np.float16)
    own = rng.standard_normal((2, longest, case.kv_dim)).astype(np.float16)
    past, chunk = slice(case.position), slice(case.position, case.position + case.count)
    gathered, scattered = own.copy(), cache.copy()
    gathered[:, past] = cache[:, slots[past]]
    scattered[:, slots[chunk]] = own[:, chunk]
    for maker, expected_cache, expected_own in (
        (make_gather_blocks, cache, gathered),
        (make_scatter_blocks, scattered, own),
    ):
        words = [as_words(array).copy() for array in (*cache, *own)]
        arguments = CopyBlocksArguments(
            keys=words[0],
            values=words[1],
            table_row=np.array([row]),
            block_table=table.reshape(-1),
            position=np.array([case.position]),
            count=np.array([case.count]),
            own_keys=words[2],
            own_values=words[3],
        )
        launch(maker(case.kv_dim, case.block_size, stride), case.ctas, THREADS, 0, arguments)
        for got, expected in zip(words, (*expected_cache, *expected_own), strict=True):
            np.testing.assert_array_equal(got, as_words(expected))
