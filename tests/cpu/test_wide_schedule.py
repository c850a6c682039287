"""How the persistent kernel for several tokens is cut: its shared memory, its mailbox, and which widths there are."""

from dataclasses import replace
from itertools import pairwise

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from tiny_models import tiny_geometry

from numba_atomflow.backends.cuda.decode_path import kernels_for, verification_of
from numba_atomflow.backends.cuda.kernels import ModelKernels
from numba_atomflow.backends.cuda.plan import cuda_plan
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.ops.cuda.persistent.schedule import (
    CONSUMER_WARPS,
    DOWN,
    MAX_COLUMNS,
    O_PROJ,
    PersistentShape,
)
from numba_atomflow.ops.cuda.runtime.chip import Chip

H200 = Chip(sms=132, shared_bytes=232448, capability=(9, 0))
SMALL = Chip(sms=170, shared_bytes=101376, capability=(12, 0))
SMOLLM2 = tiny_geometry(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=49152)
WIDTHS = {  # tokens of a step, on an H200
    "SmolLM2": (SMOLLM2, [2, 4, 8]),
    "1B": (PRESETS["llama-3.2-1b"], [2, 4, 8]),
    "3B": (PRESETS["llama-3.2-3b"], [2, 4, 8]),
    "8B": (PRESETS["llama-3.1-8b"], [2, 4]),
    "Qwen": (replace(SMOLLM2, qkv_bias=True, qk_norm=True), [2, 4, 8]),
}
SHAPES = [
    pytest.param(shape, id=f"{name}-{columns}")
    for name, (geometry, _) in WIDTHS.items()
    for columns, shape in ModelKernels(geometry, H200, persistent=True).wide_shapes.items()
]


@pytest.mark.parametrize(("geometry", "widths"), WIDTHS.values(), ids=WIDTHS)
def test_which_widths_there_are(geometry: ModelGeometry, widths: list[int]) -> None:
    kernels = ModelKernels(geometry, H200, persistent=True)
    assert list(kernels.wide_shapes) == widths
    verification = verification_of(kernels)
    assert (verification.width, verification.reason, verification.automatic) == (widths[-1], "", False)
    names = {buffer.name for buffer in cuda_plan(kernels, 128).buffers}
    assert {f"verify.mailbox_x{width}" for width in widths} <= names
    assert max(widths) <= kernels.gemv_width, "the cache has no spare positions for padding tokens"


def test_a_graph_verifies_nothing() -> None:
    kernels, _ = kernels_for(SMOLLM2, H200, "fp8", "graph")
    assert verification_of(kernels).width == 1
    assert "graph" in verification_of(kernels).reason
    assert not any(buffer.name.startswith("verify") for buffer in cuda_plan(kernels, 128).buffers)


def test_a_small_shared_memory_takes_fewer_tokens() -> None:
    kernels = ModelKernels(PRESETS["llama-3.2-3b"], SMALL, persistent=True)
    assert 8 not in kernels.wide_shapes
    assert verification_of(kernels).width == max(kernels.wide_shapes, default=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_shared_memory_holds_everything_side_by_side(shape: PersistentShape) -> None:
    columns = shape.columns
    parts = [
        (0, shape.stages * shape.stage_words),
        (shape.x_start, columns * shape.x_pitch),
        (shape.partials_start, 2 * shape.partial_words),
        (shape.reduction_start, columns * CONSUMER_WARPS),
        (shape.rope_start, columns * shape.head_dim),
        (shape.table_start, shape.table_entries),
        (2 * shape.full_start, 4 * shape.stages),
    ]
    for (start, words), (following, _) in zip(parts, [*parts[1:], (shape.dynamic_shared_bytes // 4, 0)], strict=True):
        assert start + words <= following
    assert shape.query_group <= shape.attention_rows <= shape.query_rows
    results = shape.partial_results * shape.attention_rows * (shape.head_dim + 2)
    assert shape.query_rows * shape.query_pitch + columns * shape.head_dim + results <= shape.x_words
    assert shape.dynamic_shared_bytes <= H200.shared_bytes
    assert shape.x_pitch % 128 == 64, "columns would have bank conflicts"
    assert max(plan.staged_features for plan in shape.plans.values()) <= 2 * shape.x_pitch
    for plan in shape.plans.values():
        assert plan.round_work_tiles * plan.work_tile_stages * 16 * columns <= shape.partial_words
    if columns == MAX_COLUMNS:
        assert not any(shape.plans[kind].half_tiles for kind in (O_PROJ, DOWN))


@pytest.mark.parametrize("shape", SHAPES)
def test_halves_along_k_are_work_tiles_of_different_ctas(shape: PersistentShape) -> None:
    """All work tiles of a CTA have the same half of K, which is staged once."""
    plan = shape.plans[DOWN]
    assert plan.k_halves == (shape.columns == MAX_COLUMNS and shape.hidden != 576)  # SmolLM2's K is not whole k-tiles
    if plan.k_halves:
        assert shape.sms % 2 == 0
        assert plan.work_tiles == 2 * plan.layout.tiles
        assert 2 * plan.work_tile_stages == plan.layout.k_tiles
        assert shape.mailbox.end - shape.mailbox.down_sums == shape.columns * shape.hidden
    else:
        assert shape.mailbox.end == shape.mailbox.down_sums


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mailbox_holds_all_columns(shape: PersistentShape) -> None:
    places = list(shape.mailbox._asdict().items())
    sizes = {
        "residual_in_exact": shape.hidden,
        "q": shape.heads * shape.head_dim // 2,
        "k": shape.kv_heads * shape.head_dim // 2,
        "v": shape.kv_heads * shape.head_dim // 2,
        "partials": shape.kv_splits * shape.heads * shape.head_dim,
    }
    if shape.rope_in_attention:
        sizes |= {"q": shape.qkv.out_features, "k": 0, "v": 0}
    for (name, start), (_, following) in pairwise(places):
        assert start % 16 == 0
        least = 0 if name in {"attn_out", "intermediate", "best_keys", "down_sums"} else 1
        assert following - start >= shape.columns * sizes.get(name, least)
    assert shape.mailbox.attn_out == shape.mailbox.partials, "vectors are not in the mailbox"
    assert 2 * shape.vector_words == shape.columns * (shape.heads * shape.head_dim + shape.intermediate)
    assert shape.attn_out_words % (4 * shape.columns) == 0, "loads of 16 bytes are not aligned"
    assert shape.vector_words % (4 * shape.columns) == 0, "loads of 16 bytes are not aligned"
