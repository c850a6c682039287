"""The step as a list of ops: order, names, what flows from op to op, and the bytes that a profiler counts."""

from collections.abc import Mapping

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow.checkpoint.format import tensor_layout
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.plan import plan_memory
from numba_atomflow.memory.view import View
from numba_atomflow.model.buffers import StepSizes, step_buffers
from numba_atomflow.model.step import (
    LAST_LOGITS,
    NO_LOGITS,
    SAMPLE,
    Advance,
    Attention,
    Embed,
    GateUp,
    Head,
    LmHead,
    Op,
    ProjectAdd,
    Qkv,
    Sample,
    Weight,
    Weights,
    build_head,
    build_step,
)
from numba_atomflow.ops.formats import KV_FLOAT16

MAX_SEQ_LEN, STEP_TOKENS, HEAD_ROWS = 100, 32, 4


def fake_tensors(geometry: ModelGeometry) -> dict[str, View]:
    """Views of a checkpoint's tensors, at addresses that are not read."""
    views, address = {}, 1 << 40
    for name, (dtype, shape) in tensor_layout(geometry).items():
        views[name] = View(name, address, shape, "int8" if dtype == "F8_E4M3" else "float32", readonly=True)
        address += views[name].nbytes
    return views


def fake_weights(geometry: ModelGeometry) -> Weights:
    return Weights.as_stored(fake_tensors(geometry))


def fake_buffers(geometry: ModelGeometry) -> dict[str, View]:
    plan = plan_memory(step_buffers(geometry, StepSizes(MAX_SEQ_LEN, STEP_TOKENS, HEAD_ROWS)))
    return {b.name: View(b.name, at, b.shape, b.dtype) for b, at in zip(plan.buffers, plan.offsets, strict=True)}


def step(geometry: ModelGeometry, tokens: int, head: Head) -> list[Op]:
    return build_step(geometry, fake_weights(geometry), fake_buffers(geometry), tokens, head)


def overlap(a: View, b: View) -> bool:
    return a.address < b.address + b.nbytes and b.address < a.address + a.nbytes


def covers(a: View, b: View) -> bool:
    return a.address <= b.address and b.address + b.nbytes <= a.address + a.nbytes


def test_the_ops_of_a_decode_step() -> None:
    ops = step(tiny_geometry(), 1, SAMPLE)
    layer = (Qkv, Attention, ProjectAdd, GateUp, ProjectAdd)
    assert [type(op) for op in ops] == [Embed, *layer, *layer, LmHead, Sample, Advance]
    assert [op.name for op in ops] == [
        "embed",
        *(f"layer.{i}.{stage}" for i in range(2) for stage in ("qkv", "attention", "o", "gate_up", "down")),
        "lm_head",
        "sample",
        "advance",
    ]


@pytest.mark.parametrize(
    ("head", "ending"),
    [
        (NO_LOGITS, ["layer.1.down", "advance"]),
        (LAST_LOGITS, ["layer.1.down", "lm_head", "advance"]),
        (SAMPLE, ["lm_head", "sample", "advance"]),
    ],
)
def test_the_head_decides_how_a_step_ends(head: Head, ending: list[str]) -> None:
    assert [op.name for op in step(tiny_geometry(), 7, head)][-len(ending) :] == ending


@pytest.mark.parametrize(
    ("head", "rows"),
    [
        (Head(0, 3), range(3)),
        (Head(2, 4, sample=True), range(2, 4)),
        (Head(-3, None, sample=True), range(4, 7)),
        (Head(-1, None), range(6, 7)),
        (Head(-9, 2), range(2)),
    ],
)
def test_any_rows_of_a_step_may_have_logits(head: Head, rows: range) -> None:
    assert head.rows(7) == rows
    ops = step(tiny_geometry(), 7, head)
    residual = ops[0].writes[0]
    lm_head = next(op for op in ops if isinstance(op, LmHead))
    assert lm_head.residual == residual.rows(rows.start, rows.stop)
    assert lm_head.logits.shape[0] == lm_head.x_norm.shape[0] == len(rows)
    sampled = [op for op in ops if isinstance(op, Sample)]
    assert len(sampled) == head.sample
    assert all(op.logits == lm_head.logits and op.token.shape == (len(rows),) for op in sampled)


def test_more_rows_of_logits_than_the_buffers_hold_are_refused() -> None:
    with pytest.raises(IndexError, match=r"logits|final_x_norm"):
        step(tiny_geometry(), 7, Head(0, HEAD_ROWS + 1))


@pytest.mark.parametrize("tokens", [1, 7, STEP_TOKENS])
def test_everything_read_was_written_before(tokens: int) -> None:
    """Token ids and the position come from outside; all other activations come out of an earlier op of the step."""
    ops = step(tiny_geometry(), tokens, SAMPLE)
    known: list[View] = [*ops[0].reads, *(view for view in ops[1].reads if view.name == "position")]
    assert [view.name for view in known] == ["tokens", "position"]
    for op in ops:
        for view in op.reads:
            assert any(covers(w, view) for w in known), f"{op.name} reads {view.name}, which nothing has written"
        known += op.writes


def test_what_flows_from_op_to_op() -> None:
    flow = {
        op.name: ([v.name for v in op.reads], [v.name for v in op.writes]) for op in step(tiny_geometry(), 1, SAMPLE)
    }
    assert flow == {
        "embed": (["tokens"], ["residual"]),
        **{
            f"layer.{i}.{name}": parts
            for i in range(2)
            for name, parts in {
                "qkv": (["residual", "position"], ["x_norm", "qkv", "q"]),
                "attention": (["q", "position"], ["attn_out"]),
                "o": (["attn_out", "residual"], ["residual"]),
                "gate_up": (["residual"], ["x_norm", "intermediate"]),
                "down": (["intermediate", "residual"], ["residual"]),
            }.items()
        },
        "lm_head": (["residual"], ["final_x_norm", "logits"]),
        "sample": (["logits"], ["tokens"]),
        "advance": (["position"], ["position"]),
    }


def test_shapes_follow_the_geometry_and_the_tokens() -> None:
    g = tiny_geometry(heads=6, kv_heads=2, head_dim=80)
    ops = {op.name: op for op in step(g, 7, LAST_LOGITS)}
    qkv = ops["layer.1.qkv"]
    assert isinstance(qkv, Qkv)
    assert qkv.qkv is not None
    assert qkv.weight.scales is not None
    assert (qkv.residual.shape, qkv.qkv.shape, qkv.q.shape) == ((7, g.hidden), (7, (6 + 4) * 80), (7, 480))
    assert (qkv.keys.shape, qkv.values.shape, qkv.cosines.shape) == ((100, 160), (100, 160), (100, 40))
    assert (qkv.weight.codes.shape, qkv.weight.scales.shape) == ((800, 192), (800, 2))
    gate_up = ops["layer.0.gate_up"]
    assert isinstance(gate_up, GateUp)
    assert (gate_up.weight.codes.shape, gate_up.y.shape) == ((2 * g.ffn, g.hidden), (7, g.ffn))
    lm_head = ops["lm_head"]
    assert isinstance(lm_head, LmHead)
    assert (lm_head.residual.shape, lm_head.logits.shape) == ((1, g.hidden), (1, g.vocabulary))
    assert lm_head.residual.address == qkv.residual.rows(6, 7).address  # the last token's row


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_what_a_family_has_beyond_llama_is_in_its_qkv(bias: bool, norm: bool) -> None:
    for op in step(tiny_geometry(qkv_bias=bias, qk_norm=norm), 1, SAMPLE):
        if isinstance(op, Qkv):
            extra = {field: view.name for field in ("bias", "q_norm", "k_norm") if (view := getattr(op, field))}
            layer = op.name.removesuffix(".qkv")
            named = {"bias": f"{layer}.qkv_bias"} if bias else {}
            assert extra == named | ({f"{x}_norm": f"{layer}.{x}_norm" for x in "qk"} if norm else {})


def test_every_layer_has_its_own_weights_and_cache() -> None:
    g = tiny_geometry(layers=3, qkv_bias=True, qk_norm=True)
    ops = step(g, 1, SAMPLE)
    attentions = [op for op in ops if isinstance(op, Attention)]
    caches = [view for op in attentions for view in (op.keys, op.values)]
    assert all(not overlap(a, b) for i, a in enumerate(caches) for b in caches[:i])
    for op in ops:
        if op.name.startswith("layer."):
            prefix = ".".join(op.name.split(".")[:2])
            weights = [v for field in op.WEIGHTS if getattr(op, field) for v in views_of(getattr(op, field))]
            assert all(view.name.startswith(prefix + ".") for view in weights), op.name
    written = [op for op in ops if isinstance(op, Qkv)]
    assert [(op.keys, op.values) for op in written] == [(op.keys, op.values) for op in attentions]


def views_of(weight: View | Weight) -> list[View]:
    if isinstance(weight, View):
        return [weight]
    assert weight.scales is not None
    return [weight.codes, weight.scales]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [{}, {"qkv_bias": True}, {"qk_norm": True}])
def test_a_decode_step_reads_every_weight_once_and_one_row_of_the_embedding(
    tied: bool, family: dict[str, bool]
) -> None:
    g = tiny_geometry(tied_embeddings=tied, **family)
    weights = fake_tensors(g)
    payload = sum(view.nbytes for view in weights.values())
    table = weights["embedding.weight"].nbytes + weights["embedding.scale"].nbytes
    row = g.hidden + 4 * 2  # 192 codes and the scales of two groups
    total = sum(op.weight_bytes for op in step(g, 1, SAMPLE))
    assert total == payload + row - (0 if tied else table)
    assert {op.name: op.weight_bytes for op in step(g, 7, NO_LOGITS)}["embed"] == 7 * row


def test_attention_reads_the_filled_part_of_the_cache() -> None:
    g = tiny_geometry()
    ops = step(g, 1, SAMPLE)
    for length in (1, 60, MAX_SEQ_LEN):
        assert sum(op.cache_bytes(length) for op in ops) == g.layers * 2 * length * g.kv_heads * g.head_dim * 4


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_alone_for_any_rows(tied: bool) -> None:
    g = tiny_geometry(tied_embeddings=tied)
    buffers: Mapping[str, View] = fake_buffers(g)
    lm_head = build_head(g, fake_weights(g), buffers, 5, 8)
    assert lm_head.residual == buffers["residual"].rows(5, 8)
    assert lm_head.x_norm == buffers["final_x_norm"].rows(0, 3)
    assert lm_head.logits.shape == (3, g.vocabulary)
    assert lm_head.weight.codes.name == ("embedding.weight" if tied else "vocabulary.weight")


def test_buffers_have_room_for_the_largest_step() -> None:
    g = tiny_geometry()
    sizes = StepSizes(MAX_SEQ_LEN, STEP_TOKENS, HEAD_ROWS, cache=KV_FLOAT16)
    buffers = {b.name: b for b in step_buffers(g, sizes)}
    assert buffers["kv_cache"].shape == (2, 2, MAX_SEQ_LEN, g.kv_dim)
    assert np.dtype(buffers["kv_cache"].dtype) == np.float16
    assert buffers["logits"].shape == (HEAD_ROWS, g.vocabulary)
    per_token = ("tokens", "residual", "x_norm", "qkv", "q", "attn_out", "intermediate")
    assert {buffers[name].shape[0] for name in per_token} == {STEP_TOKENS}
    with pytest.raises(IndexError, match="rows 0:33 of view residual, which has 32"):
        step(g, STEP_TOKENS + 1, NO_LOGITS)


def test_a_backend_may_pad_rows_and_positions() -> None:
    """Rows of 192 elements have a pitch of 256, and the ops' views have 192 columns."""
    g = tiny_geometry()
    sizes = StepSizes(
        MAX_SEQ_LEN, 8, 8, activation="float16", cache=KV_FLOAT16, pad_multiple=128, spare_positions=7, keep_qkv=False
    )
    plan = plan_memory(step_buffers(g, sizes))
    buffers = {b.name: View(b.name, at, b.shape, b.dtype) for b, at in zip(plan.buffers, plan.offsets, strict=True)}
    ops = {op.name: op for op in build_step(g, fake_weights(g), buffers, 3, SAMPLE)}
    qkv, gate_up, lm_head = ops["layer.0.qkv"], ops["layer.0.gate_up"], ops["lm_head"]
    assert isinstance(qkv, Qkv)
    assert isinstance(gate_up, GateUp)
    assert isinstance(lm_head, LmHead)
    assert qkv.qkv is None
    assert [view.name for view in qkv.writes] == ["x_norm", "q"]
    assert (qkv.x_norm.shape, qkv.x_norm.pitch, qkv.x_norm.dtype) == ((3, 192), 256, "float16")
    assert (gate_up.y.shape, gate_up.y.pitch) == ((3, 320), 384)
    assert lm_head.x_norm.shape == (1, 192)
    assert qkv.keys.shape == (MAX_SEQ_LEN + 7, g.kv_dim)
    assert qkv.cosines.shape == (MAX_SEQ_LEN + 7, 32)
