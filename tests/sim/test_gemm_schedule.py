"""The schedule of a GEMM: every unit of every tile is some CTA's, once; and who shares a tile is known to all."""

from collections import defaultdict

import numpy as np
import pytest
from kernel_cases import launch
from numba import cuda
from numpy.typing import NDArray

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.gemm.plan import GemmPlan
from numba_atomflow.ops.cuda.gemm.schedule import make_schedule
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles
from numba_atomflow.ops.cuda.layout.weights import PrepackedLayout

FIELDS, MOST = 5, 8  # of a record; works of a CTA


def works(plan: GemmPlan, token_tiles: int) -> NDArray[np.int32]:
    """[ctas, works, (tile, first, last, slot, count)], -1 where there is none; `slot` of the CTA itself."""
    schedule = make_schedule(plan)
    work, sharers, slot = schedule

    @ptx.kernel(1, 1)
    def list_works(token_tiles, first_slots, out):
        for number in range(MOST):
            tile, first, last = work(number, token_tiles)
            at = (cuda.blockIdx.x * MOST + number) * FIELDS
            for i in range(FIELDS):
                out[at + i] = -1
            out[at], out[at + 1], out[at + 2] = tile, first, last
            if tile >= 0 and last - first < plan.units:
                first_slot, count = sharers(tile, token_tiles)
                out[at + 3], out[at + 4] = slot(tile, token_tiles), count
                first_slots[tile] = first_slot

    out = np.zeros(plan.ctas * MOST * FIELDS, np.int32)
    first_slots = np.full(plan.row_tiles * token_tiles, -1, np.int32)
    launch(list_works, plan.ctas, 1, 0, token_tiles, first_slots, out)
    records = out.reshape(plan.ctas, MOST, FIELDS)
    shared = defaultdict(list)
    for record in records.reshape(-1, FIELDS):
        if record[0] >= 0 and record[3] >= 0:
            shared[record[0]].append(record)
    for tile, parts in shared.items():
        parts.sort(key=lambda part: part[1])  # along K
        assert [part[3] for part in parts] == [first_slots[tile] + i for i in range(len(parts))]
        assert {part[4] for part in parts} == {len(parts)}
    slots = [part[3] for parts in shared.values() for part in parts]
    assert len(set(slots)) == len(slots)
    assert max(slots, default=0) < 2 * plan.ctas
    for cta in records:  # shared tiles come last
        numbers = np.flatnonzero(cta[:, 3] >= 0)
        assert (cta[max(numbers, default=MOST) + 1 :, 0] == -1).all()
    return records


@pytest.mark.parametrize("ctas", [1, 5, 12])
@pytest.mark.parametrize(("rows", "in_features"), [(128, 128), (300, 640), (700, 1400)])
def test_every_unit_is_computed_once(ctas: int, rows: int, in_features: int) -> None:
    layout = PrepackedLayout(rows, in_features)
    for token_tiles in (1, 2, 5):
        for fixup_units, min_units in ((0, 1), (2, 3), (1000, 1)):
            plan = GemmPlan(layout, ActivationTiles(in_features, 64), 8, 2, ctas, fixup_units, min_units)
            tiles = plan.row_tiles * token_tiles
            if tiles >= ctas * MOST:
                continue
            records = works(plan, token_tiles)
            computed = np.zeros((tiles, plan.units), int)
            for tile, first, last, *_ in records.reshape(-1, FIELDS):
                if tile >= 0:
                    computed[tile, first:last] += 1
            assert (computed == 1).all()
            shares = np.where(records[..., 0] >= 0, records[..., 2] - records[..., 1], 0).sum(axis=1)
            if fixup_units == 0 and min_units == 1:
                assert shares.max() - shares.min() <= 1, "the shares are not equal"
            assert (records[..., 3] < 0).all() or fixup_units < 1000
