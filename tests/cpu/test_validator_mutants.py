"""Injected faults, one at a time: each must be detected, and attributed to the right layer and op.

A fault is either a corrupted weight, or an observer that does an op's work once more after it, in NumPy, and wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from validator_models import BLOCK, Subject, loud_weights, make_subject, three_layers

pytest.importorskip("transformers", reason="transformers makes the ground truth: pip install '.[validate]'")

from numba_atomflow.backends.base import Memory
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import Advance, Attention, GateUp, LmHead, Op, ProjectAdd, Qkv, Weight
from numba_atomflow.ops.fp8 import dequantize_groups
from numba_atomflow.ops.rms_norm import rms_norm_reference
from numba_atomflow.ops.rope import rope_reference
from numba_atomflow.validate import Report, check

Weights = dict[str, NDArray[Any]]
HEAD_DIM = 64


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    subject = make_subject(tmp_path_factory.mktemp("mutants"), three_layers())
    yield subject
    subject.checkpoint.close()


@pytest.fixture(scope="module")
def loud_subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    geometry = three_layers()
    subject = make_subject(tmp_path_factory.mktemp("loud"), geometry, loud_weights(geometry))
    yield subject
    subject.checkpoint.close()


# --- faults as observers ---------------------------------------------------------------------------------------------


@dataclass
class Mutant:
    """Runs `spoil(op, memory, start, residual)` after one op; `residual` is the stream as it was before the op."""

    op: str
    spoil: Callable[[Any, Memory, int, NDArray[np.float32]], None]

    def before(self, op: Op, memory: Memory) -> None:
        if op.name == self.op:
            self.residual = memory.read(op.residual) if hasattr(op, "residual") else np.zeros(0, np.float32)

    def after(self, op: Op, memory: Memory) -> None:
        if isinstance(op, Qkv | Attention):
            self.start = int(memory.read(op.position)[0])
        if op.name == self.op:
            self.spoil(op, memory, self.start, self.residual)


def expanded(weight: Weight, memory: Memory) -> NDArray[np.float64]:
    assert weight.scales is not None
    codes, scales = memory.read(weight.codes), memory.read(weight.scales)
    return dequantize_groups(codes.view(np.uint8), scales).astype(np.float64)


def heads_of(rows: NDArray[Any]) -> NDArray[np.float64]:
    return rows.astype(np.float64).reshape(len(rows), -1, HEAD_DIM)


def write_heads(memory: Memory, view: View, heads: NDArray[np.float64]) -> None:
    memory.write(view, heads.reshape(len(heads), -1))


def unrotated(op: Qkv, memory: Memory) -> NDArray[Any]:
    assert op.qkv is not None
    return memory.read(op.qkv)


def rotated_for_the_next_position(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    qkv, count = unrotated(op, memory), op.q.shape[0]
    later = np.minimum(np.arange(start + 1, start + 1 + count), op.cosines.shape[0] - 1)
    cosines, sines = (memory.read(view).astype(np.float64)[later] for view in (op.cosines, op.sines))
    q_dim, kv_dim = op.q.shape[1], op.keys.shape[1]
    write_heads(memory, op.q, rope_reference(heads_of(qkv[:, :q_dim]), cosines, sines))
    keys = op.keys.rows(start, start + count)
    write_heads(memory, keys, rope_reference(heads_of(qkv[:, q_dim : q_dim + kv_dim]), cosines, sines))


def rotated_interleaved(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    """Pairs (2i, 2i + 1), as in GGUF files, instead of (i, i + head_dim / 2)."""
    count = op.q.shape[0]
    at = slice(start, start + count)
    cosines, sines = (memory.read(view).astype(np.float64)[at] for view in (op.cosines, op.sines))
    q = heads_of(unrotated(op, memory)[:, : op.q.shape[1]])
    apart = np.concatenate([q[..., 0::2], q[..., 1::2]], axis=-1)
    turned = rope_reference(apart, cosines, sines)
    woven = np.stack([turned[..., : HEAD_DIM // 2], turned[..., HEAD_DIM // 2 :]], axis=-1)
    write_heads(memory, op.q, woven.reshape(q.shape))


def rotated_backwards(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    at = slice(start, start + op.q.shape[0])
    cosines, sines = (memory.read(view).astype(np.float64)[at] for view in (op.cosines, op.sines))
    write_heads(memory, op.q, rope_reference(heads_of(unrotated(op, memory)[:, : op.q.shape[1]]), cosines, -sines))


def stored_one_row_late(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    count = op.q.shape[0]
    for cache in (op.keys, op.values):
        rows_left = min(count, cache.shape[0] - start - 1)
        rows = memory.read(cache.rows(start, start + count))
        memory.write(cache.rows(start + 1, start + 1 + rows_left), rows[:rows_left])
        memory.write(cache.rows(start, start + 1), np.zeros_like(rows[:1]))


def stored_from_row_0(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    """Each step overwrites the first rows: correct for the first chunk of a prompt only."""
    if start:
        rows = memory.read(op.keys.rows(start, start + op.q.shape[0]))
        memory.write(op.keys.rows(0, len(rows)), rows)
        memory.write(op.keys.rows(start, start + len(rows)), np.zeros_like(rows))


def stray_write_to_an_earlier_row(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    if start:
        memory.write(op.values.rows(2, 3), memory.read(op.values.rows(start, start + 1)))


def keys_and_values_swapped(op: Qkv, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    keys, values = (view.rows(start, start + op.q.shape[0]) for view in (op.keys, op.values))
    k, v = memory.read(keys), memory.read(values)
    memory.write(keys, v)
    memory.write(values, k)


def attending(
    *,
    kv_head: Callable[[int, int, int], int] = lambda head, heads, kv_heads: head * kv_heads // heads,
    scale: float = HEAD_DIM**-0.5,
    visible: Callable[[int, int], int] = lambda position, _count: position + 1,
    subtract_maximum: bool = True,
) -> Callable[[Attention, Memory, int, NDArray[np.float32]], None]:
    """Attention with one change."""

    def attend(op: Attention, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
        q = heads_of(memory.read(op.q)).astype(np.float32)
        keys, values = (heads_of(memory.read(view)).astype(np.float32) for view in (op.keys, op.values))
        out = np.empty(q.shape, np.float32)
        for t in range(len(q)):
            length = min(visible(start + t, len(q)), len(keys))
            for h in range(q.shape[1]):
                kv = kv_head(h, q.shape[1], keys.shape[1])
                scores = keys[:length, kv] @ q[t, h] * np.float32(scale)
                with np.errstate(over="ignore", invalid="ignore"):
                    weights = np.exp(scores - scores.max() if subtract_maximum else scores)
                    out[t, h] = weights @ values[:length, kv] / weights.sum()
        memory.write(op.attn_out, out.reshape(len(q), -1))

    return attend


def replaces_the_residual(op: ProjectAdd, memory: Memory, _start: int, residual: NDArray[np.float32]) -> None:
    memory.write(op.residual, memory.read(op.residual) - residual)


def adds_the_residual_twice(op: ProjectAdd, memory: Memory, _start: int, residual: NDArray[np.float32]) -> None:
    memory.write(op.residual, memory.read(op.residual) + residual)


def norm_with_ten_times_epsilon(op: GateUp, memory: Memory, _start: int, residual: NDArray[np.float32]) -> None:
    memory.write(op.x_norm, rms_norm_reference(residual.astype(np.float64), memory.read(op.norm_weight), 1e-4))
    recompute_swiglu(op, memory)


def norm_by_the_mean(op: GateUp, memory: Memory, _start: int, residual: NDArray[np.float32]) -> None:
    """LayerNorm instead of RMSNorm: the mean is subtracted."""
    x = residual.astype(np.float64)
    memory.write(op.x_norm, rms_norm_reference(x - x.mean(axis=1, keepdims=True), memory.read(op.norm_weight), 1e-5))
    recompute_swiglu(op, memory)


def recompute_swiglu(op: GateUp, memory: Memory) -> None:
    gate, up = np.split(memory.read(op.x_norm) @ expanded(op.weight, memory).T, 2, axis=1)
    memory.write(op.y, gate / (1 + np.exp(-gate)) * up)


def gelu_instead_of_silu(op: GateUp, memory: Memory, _start: int, _residual: NDArray[np.float32]) -> None:
    gate, up = np.split(memory.read(op.x_norm) @ expanded(op.weight, memory).T, 2, axis=1)
    memory.write(op.y, gate / (1 + np.exp(-1.702 * gate)) * up)


def norm_of_the_row_before(op: LmHead, memory: Memory, _start: int, _residual: NDArray[np.float32]) -> None:
    memory.write(op.x_norm, np.roll(memory.read(op.x_norm), 1, axis=0))
    memory.write(op.logits, memory.read(op.x_norm) @ expanded(op.weight, memory).T)


def position_not_advanced(op: Advance, memory: Memory, start: int, _residual: NDArray[np.float32]) -> None:
    memory.write(op.position, np.array([start]))


def only_decode(spoil: Callable[..., None]) -> Callable[..., None]:
    def wrapped(op: Any, memory: Memory, start: int, residual: NDArray[np.float32]) -> None:
        if op.q.shape[0] == 1:
            spoil(op, memory, start, residual)

    return wrapped


OBSERVED: dict[str, tuple[str, Callable[..., None]]] = {
    "RoPE angle off by one position": ("layer.1.qkv", rotated_for_the_next_position),
    "RoPE pairs are neighbours": ("layer.1.qkv", rotated_interleaved),
    "RoPE turns the other way": ("layer.1.qkv", rotated_backwards),
    "KV written one slot late": ("layer.1.qkv", stored_one_row_late),
    "KV of a later block written from slot 0": ("layer.1.qkv", stored_from_row_0),
    "a value written into an old slot as well": ("layer.1.qkv", stray_write_to_an_earlier_row),
    "k and v swapped": ("layer.1.qkv", keys_and_values_swapped),
    "GQA head mapped wrong": ("layer.1.attention", attending(kv_head=lambda head, _heads, kv_heads: head % kv_heads)),
    "attention scale wrong": ("layer.1.attention", attending(scale=1 / HEAD_DIM)),
    "causal mask lets the next token in": (
        "layer.1.attention",
        attending(visible=lambda position, count: position + 1 + (count > 1)),
    ),
    "decode does not see its own key": (
        "layer.1.attention",
        only_decode(attending(visible=lambda position, _count: max(position, 1))),
    ),
    "residual not added": ("layer.1.o", replaces_the_residual),
    "residual added twice": ("layer.1.down", adds_the_residual_twice),
    "epsilon ten times too large": ("layer.1.gate_up", norm_with_ten_times_epsilon),
    "norm subtracts the mean": ("layer.1.gate_up", norm_by_the_mean),
    "another activation": ("layer.1.gate_up", gelu_instead_of_silu),
    "final norm of the row before": ("lm_head", norm_of_the_row_before),
    "position not advanced": ("advance", position_not_advanced),
}


# --- faults as corrupted weights -------------------------------------------------------------------------------------


def one_scale_group_shifted(weights: Weights) -> None:
    scales = weights["layer.1.down.scale"].copy()
    scales[:, 1] = scales[:, 0]
    weights["layer.1.down.scale"] = scales


def last_short_group_left_out(weights: Weights) -> None:
    codes = weights["layer.1.down.weight"].copy()
    codes[:, 256:] = 0
    weights["layer.1.down.weight"] = codes


def norm_weight_reversed(weights: Weights) -> None:
    weights["layer.1.ffn_norm"] = weights["layer.1.ffn_norm"][::-1].copy()


def gate_and_up_swapped(weights: Weights) -> None:
    for name in ("layer.1.gate_up.weight", "layer.1.gate_up.scale"):
        weights[name] = np.roll(weights[name], len(weights[name]) // 2, axis=0)


def one_row_of_o_is_another(weights: Weights) -> None:
    for name in ("layer.1.o.weight", "layer.1.o.scale"):
        weights[name] = weights[name].copy()
        weights[name][100] = weights[name][101]


def embedding_row_off_by_one(weights: Weights) -> None:
    for name in ("embedding.weight", "embedding.scale"):
        weights[name] = np.roll(weights[name], 1, axis=0)


def lm_head_is_the_embedding(weights: Weights) -> None:
    weights |= {f"vocabulary.{part}": weights[f"embedding.{part}"] for part in ("weight", "scale")}


CORRUPTED: dict[str, tuple[str, Callable[[Weights], None]]] = {
    "one scale group shifted": ("layer.1.down", one_scale_group_shifted),
    "last short group left out": ("layer.1.down", last_short_group_left_out),
    "norm weight reversed": ("layer.1.gate_up", norm_weight_reversed),
    "gate and up swapped": ("layer.1.gate_up", gate_and_up_swapped),
    "one row of a projection is another": ("layer.1.o", one_row_of_o_is_another),
    "embedding row off by one": ("embed", embedding_row_off_by_one),
    "tied LM head instead of an untied one": ("lm_head", lm_head_is_the_embedding),
}


# --- the tests -------------------------------------------------------------------------------------------------------


def assert_caught(report: Report, op: str) -> None:
    """The op is named, and no other layer fails."""
    assert not report.passed
    assert report.fault is not None
    assert report.fault.op == op, report.verdict()
    assert f"op at fault: {op} (" in report.verdict()
    if op.startswith("layer."):
        layer = op.rpartition(".")[0]
        assert {probe.name.rpartition(".")[0] for probe in report.probes if not probe.passed} == {layer}


def run(
    subject: Subject, weights: Weights | None = None, observers: Sequence[Any] = (), isolate: bool = True
) -> Report:
    for values in (weights or {}).values():
        values.flags.writeable = False  # as in a mapped file; for writable arrays numba would compile kernels again
    return check(subject.backend(weights), subject.truth, isolate=isolate, block=BLOCK, observers=observers)


def test_there_are_enough_mutants() -> None:
    assert len({*OBSERVED, *CORRUPTED}) >= 12


@pytest.mark.parametrize("isolate", [True, False])
def test_the_correct_models_pass(subject: Subject, loud_subject: Subject, isolate: bool) -> None:
    for model in (subject, loud_subject):
        report = run(model, isolate=isolate)
        assert report.passed, report.verdict()
        assert len(report.table) == 12


@pytest.mark.parametrize("fault", OBSERVED)
def test_a_faulty_kernel_is_caught_and_named(subject: Subject, fault: str) -> None:
    op, spoil = OBSERVED[fault]
    assert_caught(run(subject, observers=[Mutant(op, spoil)]), op)


@pytest.mark.parametrize("fault", CORRUPTED)
def test_a_corrupted_weight_is_caught_and_named(subject: Subject, fault: str) -> None:
    op, corrupt = CORRUPTED[fault]
    weights = subject.weights
    corrupt(weights)
    assert_caught(run(subject, weights), op)


def test_softmax_without_running_max_is_caught_with_large_scores(loud_subject: Subject) -> None:
    right = attending()
    wrong = attending(subtract_maximum=False)
    assert run(loud_subject, observers=[Mutant("layer.1.attention", right)]).passed
    report = run(loud_subject, observers=[Mutant("layer.1.attention", wrong)])
    assert_caught(report, "layer.1.attention")
    failed = next(probe for probe in report.probes if probe.name == "layer.1.attention")
    assert failed.share == np.inf


def test_the_numpy_attention_of_the_mutants_is_correct_without_a_fault(subject: Subject) -> None:
    assert run(subject, observers=[Mutant("layer.1.attention", attending())]).passed


def test_a_fault_in_decode_only_affects_only_decode(subject: Subject) -> None:
    op, spoil = OBSERVED["decode does not see its own key"]
    report = run(subject, observers=[Mutant(op, spoil)])
    probe = next(probe for probe in report.probes if probe.name == op)
    assert probe.prefill_share < 1 < probe.decode_share
    assert report.fault is not None
    assert report.fault.position == subject.truth.prompt_tokens


def test_without_isolation_the_first_divergent_op_is_still_named(subject: Subject) -> None:
    op, spoil = OBSERVED["GQA head mapped wrong"]
    report = run(subject, observers=[Mutant(op, spoil)], isolate=False)
    assert report.fault is not None
    assert report.fault.op == op
    failed = {probe.name for probe in report.table if not probe.passed}
    assert {"layer.1.output", "layer.2.output", "final_norm", "logits"} <= failed
    assert "layer.0.output" not in failed
