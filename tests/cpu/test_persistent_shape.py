"""How the persistent kernel deals a step out to the blocks and its memory to what lies in it."""

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
    CHUNK,
    CONSUMERS,
    DOWN,
    GATE_UP,
    OUT,
    QKV,
    SPLITS,
    THREADS,
    VOCABULARY,
    PersistentShape,
)
from numba_atomflow.ops.cuda.runtime.chip import Chip

SMOLLM2 = tiny_geometry(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152)
TINY = tiny_geometry(hidden=64, heads=1, kv_heads=1, ffn=72, vocabulary=40)
GEOMETRIES = [TINY, SMOLLM2, PRESETS["llama-3.2-3b"], PRESETS["llama-3.1-8b"]]
WEIGHED = {QKV: "qkv", OUT: "o", GATE_UP: "gate_up", DOWN: "down", VOCABULARY: "vocabulary"}


def shape_of(geometry: ModelGeometry, blocks: int = 132, shared_bytes: int = 232448) -> PersistentShape:
    chip = Chip(sms=blocks, shared_bytes=shared_bytes, capability=(9, 0))
    return ModelKernels(geometry, chip, persistent=True).persistent_shape


def kinds(shape: PersistentShape) -> list[int]:
    """Of ops 1, 2, ...: what the kernel's `kind_of` says."""
    return [QKV, ATTENTION, OUT, GATE_UP, DOWN] * shape.layers + [VOCABULARY]


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_chunk_is_dealt_exactly_once(geometry: ModelGeometry, blocks: int) -> None:
    """As `make_deal` deals shares, going on where the projection before left off; blocks get the same, give or take."""
    shape = shape_of(geometry, blocks)
    shares, slots, dealt_on = (shape.sizes(what) for what in ("shares", "slots", "dealt"))
    assert set(shares) == set(WEIGHED)
    offset, load, copied = 0, np.zeros(blocks, np.int64), np.zeros(blocks, np.int64)
    for kind in kinds(shape):
        if kind == ATTENTION:
            continue
        dealt = np.zeros((shares[kind], slots[kind]), np.int64)
        for block in range(blocks):
            first = (block + blocks - offset) % blocks
            dealt[first::blocks] += 1
            own = len(range(first, shares[kind], blocks))
            load[block] += own
            copied[block] += own * slots[kind]
        assert (dealt == 1).all()
        offset = (offset + dealt_on[kind]) % blocks
        layout = getattr(shape, WEIGHED[kind])
        assert shares[kind] * slots[kind] == layout.tiles * layout.k_tiles
    np.testing.assert_array_equal(copied, shape.copied(shape.shift))
    if shape.shift == 0:
        assert load.max() - load.min() <= 1
    if geometry.hidden > 1000:  # in smaller ones a share is much
        assert copied.max() <= 1.01 * copied.mean()


def test_dealing_skips_blocks_where_the_same_ones_would_get_more_in_every_layer() -> None:
    shape = shape_of(PRESETS["llama-3.2-3b"])
    assert sum(shape.sizes("shares")[kind] for kind in (QKV, OUT, GATE_UP, DOWN)) % 132 == 0
    assert shape.copied(0).max() > 1.02 * shape.copied(0).mean()
    assert shape.shift > 0
    assert shape.copied(shape.shift).max() < 1.005 * shape.copied(0).mean()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sizes_are_those_of_the_projections(geometry: ModelGeometry) -> None:
    """A tile's chunks cover its columns, its threads its results: two rows each; four of gate and up; one of logits."""
    shape = shape_of(geometry)
    for kind, name in WEIGHED.items():
        layout = getattr(shape, name)
        assert layout.k_tile == CHUNK
        halved = shape.sizes("halved")[kind]
        assert shape.sizes("slots")[kind] * (1 + halved) == -(-layout.in_features // (layout.group_in_features * CHUNK))
        assert shape.sizes("shares")[kind] * (16 >> halved) >= layout.out_features
        assert shape.sizes("tile_words")[kind] == layout.tile_words
        rounds = shape.sizes("round_shares")[kind]
        assert rounds >= 1
        assert rounds * shape.sizes("slots")[kind] * 16 <= shape.partial_words, "a round's sums do not fit"
        results = {QKV: 2, OUT: 2, GATE_UP: 4, DOWN: 2, VOCABULARY: 1}[kind]
        assert (16 >> halved) == results << shape.sizes("entry_bits")[kind]


@pytest.mark.parametrize(
    ("name", "halved"),
    [("llama-3.2-1b", True), ("llama-3.2-3b", True), ("llama-3.1-8b", True), ("smollm2-135m", False)],
)
def test_half_tiles_where_chunks_make_pairs(name: str, halved: bool) -> None:
    expected = {QKV: 0, OUT: halved, GATE_UP: 0, DOWN: halved, VOCABULARY: 0}
    assert shape_of(PRESETS[name]).sizes("halved") == expected


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("shared_bytes", [101376, 166912, 232448])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_shared_memory_holds_everything_side_by_side(geometry: ModelGeometry, shared_bytes: int, blocks: int) -> None:
    shape = replace(shape_of(geometry, blocks), shared_bytes=shared_bytes)
    parts = [
        (0, shape.slots * shape.slot_words),
        (shape.x_start, shape.x_words),
        (shape.partials_start, 2 * shape.partial_words),
        (shape.scalars_start, THREADS // 32 * 2),  # a float32 of each warp, or a key
        (shape.rope_start, shape.head_dim),
        (shape.table_start, 2 * shape.ops),
        (2 * shape.barriers_start, 4 * shape.slots),
    ]
    for (start, words), (following, _) in zip(parts, [*parts[1:], (shape.block_bytes // 4, 0)], strict=True):
        assert start + words <= following
    assert shape.block_bytes <= shared_bytes
    if shape.refusal() is None:  # a ring that is not there needs no room
        safe = shape.in_flight + CONSUMERS  # fewer, and it is the number of warps
        assert shape.slots == CONSUMERS or shape.slots >= safe, "a warp could take a chunk that has not landed"
        more = 1 if shape.slots >= safe else safe - shape.slots
        room = more * (4 * shape.slot_words + 16)
        assert shape.block_bytes + room > shared_bytes - 32, "there is room for more slots"
    for name in WEIGHED.values():
        layout = getattr(shape, name)
        assert layout.k_tile_words <= shape.slot_words
        assert layout.padded_in_features <= 2 * shape.x_words or name == "vocabulary"
    assert shape.slot_words % 32 == 0, "a bulk copy would not be aligned"
    assert shape.x_start % 4 == shape.query_pitch % 4 == shape.head_dim % 4 == 0, "16-byte loads would not be aligned"
    assert shape.scalars_start % 2 == 0, "keys of 8 bytes would not be aligned"


@pytest.mark.parametrize("blocks", [1, 7, 132])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_exchange_holds_everything_side_by_side(geometry: ModelGeometry, blocks: int) -> None:
    shape = shape_of(geometry, blocks)
    places = list(shape.exchange.items())
    assert places[-1][0] == "end"
    sizes = {
        "entering": geometry.hidden // 2,
        "entering_exact": geometry.hidden,
        "middle": geometry.hidden // 2,
        "middle_exact": geometry.hidden,
        "q": geometry.q_dim // 2,
        "k": geometry.kv_dim // 2,
        "v": geometry.kv_dim // 2,
        "attended": geometry.q_dim // 2,
        "ffn": geometry.ffn // 2,
        "sums": shape.splits * geometry.q_dim,
        "stats": shape.splits * geometry.heads * 2,
    }
    assert [name for name, _ in places[:-1]] == list(sizes)
    for (name, start), (_, following) in pairwise(places):
        assert start + sizes[name] <= following
        assert start % 2 == 0, "two words are read at once"


@pytest.mark.parametrize("blocks", [8, 9, 66, 132, 1000])
def test_chunks_of_the_sequence_have_a_block_and_a_lane_each(blocks: int) -> None:
    shape = shape_of(PRESETS["llama-3.1-8b"], blocks)
    assert 1 <= shape.splits <= SPLITS == 32
    assert shape.splits * shape.kv_heads <= blocks


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden": 72}, "multiples of 16"),
        ({"ffn": 68}, "multiples of 16"),
        ({"head_dim": 72}, "multiples of 16"),
        ({"heads": 9}, "9 heads share"),
        ({"sms": 0}, "more key/value heads"),
        ({"shared_bytes": 16 << 10}, "16 KB of shared memory"),
        ({"in_flight": 1000}, "no room for a ring"),
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
