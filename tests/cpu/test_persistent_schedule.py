"""The static schedule of the persistent kernel, and the layout of its shared memory and its mailbox."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tiny_models import tiny_geometry

from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.ops.cuda.persistent.schedule import (
    ATTENTION,
    CONSUMER_THREADS,
    CONSUMER_WARPS,
    DOWN,
    GATE_UP,
    K_TILE_GROUPS,
    LM_HEAD,
    MAX_KV_SPLITS,
    O_PROJ,
    QKV,
    PersistentShape,
)
from numba_atomflow.ops.cuda.runtime.chip import Chip

SMOLLM2 = tiny_geometry(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152)
TINY = tiny_geometry(hidden=64, heads=1, kv_heads=1, ffn=72, vocabulary=40)
QWEN = tiny_geometry(layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, ffn=3072, qkv_bias=True, qk_norm=True)
GEOMETRIES = [TINY, SMOLLM2, QWEN, PRESETS["llama-3.2-3b"], PRESETS["llama-3.1-8b"]]
WEIGHED = {QKV: "qkv", O_PROJ: "o", GATE_UP: "gate_up", DOWN: "down", LM_HEAD: "lm_head"}


def shape_of(geometry: ModelGeometry, ctas: int = 132, shared_bytes: int = 232448) -> PersistentShape:
    chip = Chip(sms=ctas, shared_bytes=shared_bytes, capability=(9, 0))
    return ModelKernels(geometry, chip, persistent=True).persistent_shape


def kinds(shape: PersistentShape) -> list[int]:
    """Of ops 1, 2, ...: what the kernel's `kind_of` says."""
    return [QKV, ATTENTION, O_PROJ, GATE_UP, DOWN] * shape.layers + [LM_HEAD]


@pytest.mark.parametrize("ctas", [1, 7, 132])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_stage_is_scheduled_exactly_once(geometry: ModelGeometry, ctas: int) -> None:
    """As `make_first_work_tile` does, going on where the projection before ended; CTAs get equal shares, or nearly."""
    shape = shape_of(geometry, ctas)
    assert set(shape.plans) == set(WEIGHED)
    offset, load, filled = 0, np.zeros(ctas, np.int64), np.zeros(ctas, np.int64)
    for kind in kinds(shape):
        if kind == ATTENTION:
            continue
        plan = shape.plans[kind]
        scheduled = np.zeros((plan.work_tiles, plan.work_tile_stages), np.int64)
        for cta in range(ctas):
            first = (cta + ctas - offset) % ctas
            scheduled[first::ctas] += 1
            own = len(range(first, plan.work_tiles, ctas))
            load[cta] += own
            filled[cta] += own * plan.work_tile_stages
        assert (scheduled == 1).all()
        offset = (offset + shape.schedule_advance(plan)) % ctas
        layout = getattr(shape, WEIGHED[kind])
        assert plan.work_tiles * plan.work_tile_stages == layout.tiles * layout.k_tiles
    np.testing.assert_array_equal(filled, shape.stages_filled(shape.rotation))
    if shape.rotation == 0:
        assert load.max() - load.min() <= 1
    if geometry.hidden > 1000:  # in smaller ones a work tile is much
        assert filled.max() <= 1.01 * filled.mean()


def test_the_schedule_rotates_where_the_same_ctas_would_get_more_in_every_layer() -> None:
    shape = shape_of(PRESETS["llama-3.2-3b"])
    assert sum(shape.plans[kind].work_tiles for kind in (QKV, O_PROJ, GATE_UP, DOWN)) % 132 == 0
    assert shape.stages_filled(0).max() > 1.02 * shape.stages_filled(0).mean()
    assert shape.rotation > 0
    assert shape.stages_filled(shape.rotation).max() < 1.005 * shape.stages_filled(0).mean()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_plans_are_those_of_the_projections(geometry: ModelGeometry) -> None:
    """A tile's k-tiles cover K, its threads its results: two rows each; four of gate and up; one of logits."""
    shape = shape_of(geometry)
    for kind, name in WEIGHED.items():
        layout = getattr(shape, name)
        assert layout.k_tile == K_TILE_GROUPS
        plan = shape.plans[kind]
        assert plan.layout is layout
        assert plan.work_tile_stages * (1 + plan.half_tiles) == -(
            -layout.in_features // (layout.group_in_features * K_TILE_GROUPS)
        )
        assert plan.work_tiles * (16 >> plan.half_tiles) >= layout.out_features
        rounds = plan.round_work_tiles
        assert rounds >= 1
        assert rounds * plan.work_tile_stages * 16 <= shape.partial_words, "a round's sums do not fit"
        results = {QKV: 2, O_PROJ: 2, GATE_UP: 4, DOWN: 2, LM_HEAD: 1}[kind]
        assert (16 >> plan.half_tiles) == results << plan.epilogue_bits


@pytest.mark.parametrize(
    ("name", "half_tiles"),
    [("llama-3.2-1b", True), ("llama-3.2-3b", True), ("llama-3.1-8b", True), ("smollm2-135m", False)],
)
def test_8_row_tiles_where_k_tiles_make_pairs(name: str, half_tiles: bool) -> None:
    expected = {QKV: 0, O_PROJ: half_tiles, GATE_UP: 0, DOWN: half_tiles, LM_HEAD: 0}
    assert {kind: plan.half_tiles for kind, plan in shape_of(PRESETS[name]).plans.items()} == expected


@pytest.mark.parametrize("ctas", [1, 7, 132])
@pytest.mark.parametrize("shared_bytes", [101376, 166912, 232448])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shared_memory_holds_everything_side_by_side(geometry: ModelGeometry, shared_bytes: int, ctas: int) -> None:
    shape = replace(shape_of(geometry, ctas), shared_bytes=shared_bytes)
    parts = [
        (0, shape.stages * shape.stage_words),
        (shape.x_start, shape.x_words),
        (shape.partials_start, 2 * shape.partial_words),
        (shape.reduction_start, CONSUMER_THREADS // 32 * 2),  # a float32 of each warp, or a key
        (shape.rope_start, shape.head_dim),
        (shape.table_start, shape.table_entries),
        (2 * shape.full_start, 4 * shape.stages),
    ]
    for (start, words), (following, _) in zip(parts, [*parts[1:], (shape.dynamic_shared_bytes // 4, 0)], strict=True):
        assert start + words <= following
    assert shape.dynamic_shared_bytes <= shared_bytes
    if shape.refusal() is None:  # a pipeline that is not there needs no room
        safe = shape.copies_in_flight + CONSUMER_WARPS  # fewer, and it is the number of warps
        assert shape.stages == CONSUMER_WARPS or shape.stages >= safe, "a warp could read a k-tile that has not arrived"
        more = 1 if shape.stages >= safe else safe - shape.stages
        room = more * (4 * shape.stage_words + 16)
        assert shape.dynamic_shared_bytes + room > shared_bytes - 32, "there is room for more stages"
    for name in WEIGHED.values():
        layout = getattr(shape, name)
        assert layout.k_tile_words <= shape.stage_words
        assert layout.padded_in_features <= 2 * shape.x_words or name == "lm_head"
    assert shape.stage_words % 32 == 0, "a bulk copy would not be aligned"
    assert shape.x_start % 4 == shape.query_pitch % 4 == shape.head_dim % 4 == 0, "16-byte loads would not be aligned"
    assert shape.reduction_start % 2 == 0, "keys of 8 bytes would not be aligned"


@pytest.mark.parametrize("ctas", [1, 7, 132])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_mailbox_holds_everything_side_by_side(geometry: ModelGeometry, ctas: int) -> None:
    shape, finished_late = shape_of(geometry, ctas), geometry is QWEN
    places = list(shape.mailbox._asdict().items())
    assert places[-1][0] == "end"
    sizes = {
        "residual_in": geometry.hidden // 2,
        "residual_in_exact": geometry.hidden,
        "residual_mid": geometry.hidden // 2,
        "residual_mid_exact": geometry.hidden,
        "q": geometry.q_dim + 2 * geometry.kv_dim if finished_late else geometry.q_dim // 2,
        "k": 0 if finished_late else geometry.kv_dim // 2,
        "v": 0 if finished_late else geometry.kv_dim // 2,
        "attn_out": geometry.q_dim // 2,
        "intermediate": geometry.ffn // 2,
        "partials": shape.kv_splits * geometry.q_dim,
        "softmax_stats": shape.kv_splits * geometry.heads * 2,
        "best_keys": 0,  # of several ranks
        "down_sums": 0,
    }
    assert [name for name, _ in places[:-1]] == list(sizes)
    for (name, start), (_, following) in pairwise(places):
        assert start + sizes[name] <= following
        assert start % 2 == 0, "two words are read at once"


@pytest.mark.parametrize("ctas", [8, 9, 66, 132, 1000])
def test_kv_splits_have_a_cta_and_a_lane_each(ctas: int) -> None:
    shape = shape_of(PRESETS["llama-3.1-8b"], ctas)
    assert 1 <= shape.kv_splits <= MAX_KV_SPLITS == 32
    assert shape.kv_splits * shape.kv_heads <= ctas


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 72}, "multiples of 16"),
        ({"intermediate": 68}, "multiples of 16"),
        ({"head_dim": 72}, "multiples of 16"),
        ({"heads": 9}, "9 heads share"),
        ({"sms": 0}, "more key/value heads"),
        ({"shared_bytes": 16 << 10}, "16 KB of shared memory"),
        ({"copies_in_flight": 1000}, "no room for a pipeline"),
    ],
    ids=str,
)
def test_what_does_not_work_is_refused(changes: dict[str, int], reason: str) -> None:
    shape = shape_of(TINY)
    assert shape.refusal() is None
    refusal = replace(shape, **changes).refusal()
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_models_run_on_large_gpus(geometry: ModelGeometry) -> None:
    assert shape_of(geometry).refusal() is None
