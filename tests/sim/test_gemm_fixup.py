"""Tiles that several CTAs share, as a GPU adds them: every CTA a slice, when the partial sums of all are written."""

from typing import NamedTuple

import numpy as np
import pytest
from kernel_cases import generator, launch
from numba import cuda, float32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.epilogue import CONSUMERS, make_store_epilogue
from numba_atomflow.ops.cuda.gemm.fixup import make_fixup
from numba_atomflow.ops.cuda.gemm.plan import UNIT, GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import make_schedule
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout
from numba_atomflow.ops.cuda.runtime.spec import F32, NUMBER
from numba_atomflow.ops.cuda.scalars import i32

ROWS, LANES = 16, 32  # those of a CTA's first warp: the others do the same elsewhere


class Arguments(NamedTuple):
    """`values`: [ctas, tiles, sums, LANES], the partial sums."""

    partials: F32
    token_tiles: NUMBER
    values: F32
    y: F32


def fail(nanoseconds: int) -> None:
    raise AssertionError("waits, though all partial sums are written")


@pytest.mark.parametrize(
    ("tile_tokens", "token_tiles", "ctas"),
    [
        (16, 1, 3),  # three CTAs for two fragments
        (40, 2, 5),  # a CTA has the end of a tile and the beginning of the next; six parts or five fragments at once
        (72, 1, 12),  # so wide that one sum is looked at first; three CTAs have no fragment
    ],
)
def test_slices(tile_tokens: int, token_tiles: int, ctas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output is the sum of its parts in the order of K, bit for bit; 0 and -0 are sums like others."""
    rows, tokens = 128, tile_tokens * token_tiles
    layout = PrepackedLayout(rows, 12 * UNIT)
    plan = GemmPlan(layout, ActivationTiles(layout.in_features, tokens), tile_tokens, 2, ctas)
    schedule = make_schedule(plan)
    put, settle = make_fixup(plan, schedule, make_store_epilogue(plan), CONSUMERS)
    work, count = schedule.work, tile_tokens // 2

    @ptx.kernel(LANES, 1)
    def put_all(io):
        thread = i32(cuda.threadIdx.x)
        sums = cuda.local.array(count, float32)
        for number in range(token_tiles):
            tile, first, _ = work(number, io.token_tiles)
            if tile >= 0:
                for i in range(count):
                    sums[i] = io.values[((first * token_tiles + tile) * count + i) * LANES + thread]
                put(io, tile, sums, thread)

    @ptx.kernel(LANES, 1)
    def settle_all(io):
        settle(io, io.y, i32(0), i32(cuda.threadIdx.x))

    rng = generator(tile_tokens, token_tiles, ctas)
    values = rng.standard_normal((plan.units, token_tiles, count, LANES)).astype(np.float32)  # by first unit of a part
    values[rng.random(values.shape) < 0.2] = 0.0
    values[rng.random(values.shape) < 0.2] = -0.0
    values[:, :, 0], values[:, :, 1, 0] = 0.0, np.inf
    partials, y = np.zeros(plan.partials, np.float32), np.full(tokens * rows, np.nan, np.float32)
    io = Arguments(partials, token_tiles, values.reshape(-1), y)
    launch(put_all, ctas, LANES, 0, io)
    assert partials.any()
    monkeypatch.setattr(ptx, "SIMULATED", False)
    monkeypatch.setattr(ptx, "nanosleep", fail)
    settle_all[ctas, LANES, 0, 0](io)
    assert not partials.any(), "partial sums are not zero for the next launch"
    assert not np.signbit(partials).any()

    shares = [cta * plan.units * token_tiles // ctas for cta in range(ctas)]
    expected = np.zeros((token_tiles, count, LANES), np.float32)
    for tile in range(token_tiles):
        starts = {0, *(start - tile * plan.units for start in shares if 0 < start - tile * plan.units < plan.units)}
        for start in sorted(starts):
            expected[tile] += values[start, tile]
    lane, i = np.arange(LANES), np.arange(count)[:, None]
    token, row = i // 4 * 8 + lane % 4 * 2 + i % 2, lane // 4 + i // 2 % 2 * 8
    found = y.reshape(token_tiles, tile_tokens, rows)[:, token, row]
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
