"""Epilogues of a GEMM behind a kernel that only reads fragments, against float64: in the simulator, or on a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from kernel_cases import generator, launch, poisoned, relative_error, within
from numba import cuda, float32, uint32
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.activation import silu_reference
from numba_atomflow.ops.cuda.gemm import arguments as gemm
from numba_atomflow.ops.cuda.gemm.epilogue import (
    CONSUMERS,
    GemmEpilogue,
    make_add_epilogue,
    make_qkv_epilogue,
    make_stage_barrier,
    make_store_epilogue,
    make_swiglu_epilogue,
)
from numba_atomflow.ops.cuda.gemm.plan import TILE_ROWS, GemmPlan
from numba_atomflow.ops.cuda.gemm.staged import make_staged_add_epilogue, make_staged_qkv_epilogue
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.rope import rope_reference, rope_table


@dataclass(frozen=True)
class EpilogueCase:
    """An epilogue at one geometry. `tile_tokens` below `tokens` makes several tiles along the tokens."""

    kind: str
    out_features: int
    tokens: int
    tile_tokens: int
    head_dim: int = 64
    heads: int = 1
    kv_heads: int = 1
    count: int = 0
    staged: bool = False  # by 4-byte words, as for wide tiles
    resident: int = 1

    @property
    def plan(self) -> GemmPlan:
        half = {"swiglu": self.out_features // 2, "qkv": self.head_dim // 2}.get(self.kind, 0)
        layout = PrepackedLayout(self.out_features, 128, half)
        return GemmPlan(layout, ActivationTiles(128, self.tokens), self.tile_tokens, 2, 1, resident=self.resident)


def qkv_case(
    tokens: int, tile_tokens: int, head_dim: int, heads: int, kv_heads: int, count: int, *, staged: bool = False
) -> EpilogueCase:
    rows = (heads + 2 * kv_heads) * head_dim
    return EpilogueCase("qkv", rows, tokens, tile_tokens, head_dim, heads, kv_heads, count, staged)


EPILOGUES = (
    EpilogueCase("store", 130, 16, 16),  # a second tile of rows, two of which exist
    EpilogueCase("store", 37, 16, 8),
    EpilogueCase("add", 48, 16, 8),
    EpilogueCase("add", 155, 8, 8),
    EpilogueCase("swiglu", 160, 16, 16),  # 80 units: of the second K block 16 are there
    EpilogueCase("swiglu", 42, 24, 8),  # 21 units
    qkv_case(16, 16, 64, 2, 1, count=11),
    replace(qkv_case(16, 8, 80, 1, 1, count=1), resident=2),  # angles are prefetched
    EpilogueCase("add", 148, 48, 48, staged=True),  # 8 tokens at a time; of a second tile of rows there are 20
    qkv_case(80, 80, 64, 2, 1, count=70, staged=True),  # 16 at a time
    qkv_case(48, 48, 80, 1, 1, count=3, staged=True),  # 8 at a time; heads begin within a warpgroup's rows
)


def fragments_kernel(plan: GemmPlan, epilogue: GemmEpilogue) -> Any:
    """Kernel (arguments of the epilogue): a GEMM whose accumulators are read from `io.partials` [rows, tokens]."""
    tokens, tile_tokens, row_tiles = plan.x.tokens, plan.tile_tokens, plan.row_tiles
    store, fetch, flush, stage_barrier = epilogue.store, epilogue.fetch, epilogue.flush, make_stage_barrier(epilogue)
    staged, held_count, prepare = epilogue.stage_words > 0, max(1, epilogue.held), epilogue.prepare
    together = epilogue.stage_tokens if staged else tile_tokens

    @ptx.kernel(CONSUMERS, 1)
    def fragments(io):
        stage, held = cuda.shared.array(0, uint32), cuda.local.array(held_count, float32)
        thread = cuda.threadIdx.x
        lane, warp = thread & 31, thread >> 5
        prepare(io, thread)
        for number in range(cuda.blockIdx.x, row_tiles * io.token_tiles, cuda.gridDim.x):
            row_tile, first = number % row_tiles, number // row_tiles * tile_tokens
            for begin in range(0, tile_tokens, together):
                end = min(begin + together, tile_tokens)
                if staged:
                    fetch(io, row_tile, first, begin, end, thread, held)
                    stage_barrier(thread)
                for in_tile in range(begin, end, 8):
                    tile, token = row_tile * 8 + warp, first + in_tile
                    at = (tile * 16 + (lane >> 2)) * tokens + token + (lane & 3) * 2
                    c0, c1 = io.partials[at], io.partials[at + 1]
                    c2, c3 = io.partials[at + 8 * tokens], io.partials[at + 8 * tokens + 1]
                    store(io, stage, tile, lane, token, in_tile - begin, c0, c1, c2, c3)
                if staged:
                    stage_barrier(thread)
                    flush(io, stage, row_tile, first, begin, end, thread, held)

    return fragments


def _run(case: EpilogueCase, epilogue: GemmEpilogue, arguments: Any) -> None:
    launch(fragments_kernel(case.plan, epilogue), 2, CONSUMERS, epilogue.stage_words * 4, arguments)


def check_epilogue(case: EpilogueCase) -> None:
    """Float32 outputs exactly, or to 1e-6 where they are computed; 3e-4 for those that are rounded to float16."""
    rng, plan = generator(case.out_features, case.tokens, case.tile_tokens), case.plan
    source = plan.layout.source_rows().reshape(-1)
    product = rng.standard_normal((case.tokens, case.out_features)).astype(np.float32) * 2
    rows = np.zeros((plan.row_tiles * TILE_ROWS, case.tokens), np.float32)  # rows that do not exist: zero weights
    rows[: len(source)][source >= 0] = product.T[source[source >= 0]]
    common = {
        "weights": poisoned(1, dtype=np.uint32),
        "x": poisoned(1, dtype=np.uint32),
        "partials": rows.reshape(-1),
        "token_tiles": case.tokens // case.tile_tokens,
    }
    if case.kind == "store":
        y = poisoned(case.tokens * case.out_features)
        _run(case, make_store_epilogue(plan), gemm.GemmStoreArguments(**common, y=y))
        np.testing.assert_array_equal(y.reshape(product.shape), product)
    elif case.kind == "add":
        before = rng.standard_normal(product.shape).astype(np.float32)
        residual = before.reshape(-1).copy()
        make = make_staged_add_epilogue if case.staged else make_add_epilogue
        _run(case, make(plan), gemm.GemmAddArguments(**common, residual=residual))
        np.testing.assert_array_equal(residual.reshape(product.shape), before + product)
    elif case.kind == "swiglu":
        check_swiglu(case, common, product.astype(np.float64))
    else:
        check_qkv(case, common, product.astype(np.float64))


def check_swiglu(case: EpilogueCase, common: dict[str, Any], product: NDArray[np.float64]) -> None:
    units = case.out_features // 2
    tiles = ActivationTiles(units, case.tokens)
    words = poisoned(tiles.words, dtype=np.uint32)
    arguments = gemm.GemmSwigluArguments(**common, intermediate=words)
    _run(case, make_swiglu_epilogue(case.plan, tiles), arguments)
    expected = silu_reference(product[:, :units]) * product[:, units:]
    within("SwiGLU to float16", relative_error(tiles.unpack(words), expected), 3e-4)
    written = -(-units // 64) * 64
    padded = ActivationTiles(tiles.blocks * 64, case.tokens).unpack(words)
    assert not padded[:, units:written].any(), "units that do not exist are not zero"
    assert np.isnan(padded[:, written:]).all(), "wrote beyond the K blocks that have units"


def check_qkv(case: EpilogueCase, common: dict[str, Any], product: NDArray[np.float64]) -> None:
    positions, dim, tokens = case.count + 9, case.head_dim, case.tokens
    first = positions - case.count  # the last token takes the last position of cache and table
    q_width, kv_width = case.heads * dim, case.kv_heads * dim
    cosines, sines = rope_table(10000.0 ** (-np.arange(0, dim, 2) / dim), positions)
    q = poisoned(tokens * q_width, dtype=np.uint16)
    keys, values = (poisoned(positions * kv_width, dtype=np.uint16) for _ in range(2))
    arguments = gemm.GemmQkvArguments(
        **common,
        count=np.array([case.count], np.int64),
        position=np.array([first], np.int64),
        cosines=cosines.reshape(-1),
        sines=sines.reshape(-1),
        q=q,
        keys=keys,
        values=values,
    )
    make = make_staged_qkv_epilogue if case.staged else make_qkv_epilogue
    _run(case, make(case.plan, case.heads, case.kv_heads), arguments)
    rows = slice(first, positions)
    angles = cosines[rows].astype(np.float64), sines[rows].astype(np.float64)
    parts = np.split(product[: case.count], [q_width, q_width + kv_width], axis=1)
    rotated = [rope_reference(part.reshape(case.count, -1, dim), *angles) for part in parts[:2]]
    for got, want in ((q, rotated[0]), (keys, rotated[1]), (values, parts[2])):
        new = got.reshape(-1, want.size // case.count)
        if got is not q:
            assert (new[:first] == 0xFFFF).all(), "wrote into the past"
            new = new[rows]
        new = np.ascontiguousarray(new[: case.count]).view(np.float16)
        within("q, k, v to float16", relative_error(new, want.reshape(new.shape)), 3e-4)
