"""Validation of small models: results, comparisons, and reports."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from validator_models import BLOCK, DECODE_STEPS, PROMPT, Subject, like_llama_3b, make_subject, three_layers

pytest.importorskip("transformers", reason="transformers makes the ground truth: pip install '.[validate]'")

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory
from numba_atomflow.errors import ContextError, GroundTruthError, OptionError
from numba_atomflow.memory.view import View
from numba_atomflow.model.step import LAST_LOGITS, SAMPLE, Head, Op
from numba_atomflow.validate import Precision, SignFlip, all_probes, check, inject, make_ground_truth, record
from numba_atomflow.validate.tolerance import tolerances


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    subject = make_subject(tmp_path_factory.mktemp("validate"), three_layers())
    yield subject
    subject.checkpoint.close()


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    subject = make_subject(tmp_path_factory.mktemp("llama"), like_llama_3b())
    yield subject
    subject.checkpoint.close()


# --- correct models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("block", [None, BLOCK, 3, 1])
def test_a_correct_model_passes_with_every_prefill_chunk(subject: Subject, block: int | None, isolate: bool) -> None:
    report = check(subject.backend(), subject.truth, block=block, isolate=isolate)
    assert report.passed, report.verdict()
    assert report.verdict() == "PASS: 12/12 probes, 19/19 inner stages."
    assert report.logits is not None
    assert report.logits.agreed == report.logits.positions == len(PROMPT) + DECODE_STEPS
    assert report.logits.first_disagreement is None
    assert len(report.position_shares) == len(PROMPT) + DECODE_STEPS
    assert max(report.position_shares) == max(probe.share for probe in report.probes)
    assert 0 <= report.logits.mean_kl <= report.logits.max_kl < 1e-9
    assert report.logits.next_token == report.logits.expected_token == subject.truth.tokens[len(PROMPT)]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_model_of_llama_3b_proportions_passes_37_of_37(llama_like: Subject, isolate: bool) -> None:
    report = check(llama_like.backend(), llama_like.truth, isolate=isolate, block=BLOCK)
    assert report.verdict().startswith("PASS: 37/37 probes"), report.verdict()


def test_28_layers_have_37_probes_in_execution_order() -> None:
    probes = [probe for probe in all_probes(like_llama_3b()) if probe.in_table]
    assert [probe.name for probe in probes] == [
        "embedding",
        *(f"layer.0.{name}" for name in ("input_norm", "q", "k", "v", "attention", "mlp")),
        *(f"layer.{i}.output" for i in range(28)),
        "final_norm",
        "logits",
    ]


def test_every_op_of_every_layer_is_followed_by_a_probe_or_a_stage(subject: Subject) -> None:
    ops = [op.name for op in subject.backend().step(1, SAMPLE)]
    assert set(ops) - {probe.op for probe in all_probes(subject.geometry)} == {"sample", "advance"}


def test_observing_changes_nothing(subject: Subject) -> None:
    seen = record(subject.backend(), subject.geometry, PROMPT, DECODE_STEPS)
    with Engine.load(subject.checkpoint.path, "cpu", len(seen.tokens)) as engine:
        logits = engine.feed(PROMPT, all_logits=True)
        np.testing.assert_array_equal(logits, seen.tensors["logits"][: len(PROMPT)])
        reply = engine.generate(PROMPT, SamplingParams(max_tokens=DECODE_STEPS, ignore_eos=True)).finish()
    assert seen.tokens == subject.truth.tokens == (*PROMPT, *reply.token_ids)


def test_a_decode_step_under_observation_is_the_bound_list_of_decode(subject: Subject) -> None:
    backend = subject.backend()
    backend.seek(0)
    backend.observe([5], SAMPLE, Names(names := []))
    assert names == [op.name for op in backend.step(1, SAMPLE)]
    observed, bound = backend.sampled_tokens(), dict(backend._bound)
    backend.seek(0)
    backend._tokens[0] = 5
    backend.decode()
    assert backend.sampled_tokens() == observed
    assert {key: id(actions) for key, actions in backend._bound.items()} == {
        key: id(actions) for key, actions in bound.items()
    }


class Names:
    """An observer that records the names of ops."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def before(self, op: Op, _memory: Memory) -> None:
        self.names.append(op.name)

    def after(self, op: Op, _memory: Memory) -> None:
        assert self.names[-1] == op.name


# --- two backends ----------------------------------------------------------------------------------------------------


def test_two_backends_are_compared_without_a_ground_truth(subject: Subject) -> None:
    seen = record(subject.backend(), subject.geometry, PROMPT, DECODE_STEPS)
    report = check(subject.backend(), seen)
    assert report.passed
    assert report.reference == "cpu backend"
    assert {probe.name for probe in report.probes if probe.relative_l2 > 0} <= {"logits"}
    assert max(probe.relative_l2 for probe in report.probes) < 1e-6  # the last row's, alone and among others
    weights = subject.weights
    weights["layer.2.o.scale"] = weights["layer.2.o.scale"] * np.float32(1.001)
    perturbed = check(subject.backend(weights), seen)
    assert perturbed.fault is not None
    assert perturbed.fault.op == "layer.2.o"


def test_chunks_are_compared_with_single_tokens(subject: Subject) -> None:
    seen = record(subject.backend(), subject.geometry, PROMPT, DECODE_STEPS, block=1)
    report = check(subject.backend(), seen, block=BLOCK)
    assert report.passed, report.verdict()
    assert max(probe.relative_l2 for probe in report.probes) > 0  # other kernels, other rounding


# --- tolerances ------------------------------------------------------------------------------------------------------


def test_tolerances_grow_with_depth_and_not_with_isolation(subject: Subject) -> None:
    actual = Precision.of_ops(subject.backend().step(1, SAMPLE))
    assert actual == Precision()
    open_end = tolerances(subject.truth, actual, "none")
    isolated = tolerances(subject.truth, actual, "layers")
    outputs = [f"layer.{i}.output" for i in range(3)]
    assert np.all(np.diff([open_end[name].max() for name in outputs]) > 0)
    assert np.all(isolated["layer.2.output"] < open_end["layer.2.output"])
    assert all(np.all(isolated[probe.name] <= open_end[probe.name]) for probe in all_probes(subject.geometry))
    own = tolerances(subject.truth, actual, "ops")
    assert all(np.all(own[probe.name] <= isolated[probe.name]) for probe in all_probes(subject.geometry))
    assert max(values.max() for values in open_end.values()) < 1e-3


def test_tolerances_include_narrow_storage_and_quantized_weights(subject: Subject) -> None:
    wide = tolerances(subject.truth, Precision(), "layers")
    half = tolerances(subject.truth, Precision(k=2.0**-11, v=2.0**-11), "layers")
    assert np.all(half["layer.1.q"] == wide["layer.1.q"])
    assert np.all(half["layer.1.v"] > 50 * wide["layer.1.v"])
    assert half["layer.1.v"][0] == pytest.approx(4 * 2.0**-11, rel=1e-2)
    fp8 = tolerances(subject.truth, Precision(weights=2.0**-4), "layers")
    assert fp8["embedding"][0] == pytest.approx(4 * 2.0**-4, rel=1e-6)


def test_the_original_weights_as_reference(subject: Subject) -> None:
    truth = make_ground_truth(subject.checkpoint, PROMPT, DECODE_STEPS, "original", subject.folder)
    report = check(subject.backend(), truth, isolate=True)
    assert report.passed, report.verdict()
    embedding = report.probes[0]
    assert 0.01 < embedding.relative_l2 < 0.0625  # E4M3 has three mantissa bits


# --- reports ---------------------------------------------------------------------------------------------------------


def test_only_the_requested_layers_are_compared(subject: Subject) -> None:
    report = check(subject.backend(), subject.truth, layers=range(1, 3))
    assert {probe.name.rpartition(".")[0] for probe in report.probes} == {"layer.1", "layer.2"}
    assert report.verdict() == "PASS: 2/2 probes, 16/16 inner stages."
    assert report.logits is None
    elsewhere = check(
        subject.backend(), subject.truth, layers=range(2, 3), isolate=True, observers=[SignFlip("layer.0.o")]
    )
    assert elsewhere.passed


@pytest.mark.parametrize("layers", [range(3, 4), range(2, 2), range(2, 9)])
def test_layers_outside_the_model_are_refused(subject: Subject, layers: range) -> None:
    with pytest.raises(OptionError, match="--layers"):
        check(subject.backend(), subject.truth, layers=layers)


def test_a_fault_in_every_op_is_attributed_to_it(subject: Subject) -> None:
    ops: Sequence[Op] = subject.backend().step(1, SAMPLE)
    for op in ops:
        if op.name in {"sample", "advance"}:
            with pytest.raises(OptionError, match=f"--inject {op.name} names no op"):
                inject(op.name, ops)
        elif op.name != "layer.0.down":  # one layer per op: `down` in layer 0, the other ops in layers 1 and 2
            report = check(subject.backend(), subject.truth, isolate=True, observers=[inject(op.name, ops)])
            assert report.fault is not None
            assert report.fault.op == op.name


def test_each_op_s_own_error_is_told_from_what_it_inherits(subject: Subject) -> None:
    ops: Sequence[Op] = subject.backend().step(1, SAMPLE)
    report = check(subject.backend(), subject.truth, block=BLOCK, added=True)
    assert report.passed, report.verdict()
    by_name = {probe.name: probe for probe in report.probes}
    assert by_name["layer.0.q"].added == by_name["layer.0.q"].relative_l2  # its input is the embedding, which is exact
    assert all(probe.added is not None and probe.added < 1e-6 for probe in report.probes)
    last = by_name["layer.2.q"]
    assert last.added is not None
    assert last.inherited == pytest.approx((last.relative_l2**2 - last.added**2) ** 0.5)
    assert last.inherited > last.added
    for op in ("layer.1.qkv", "layer.1.attention", "layer.1.o", "layer.1.gate_up", "layer.1.down"):
        faulty = check(subject.backend(), subject.truth, added=True, observers=[inject(op, ops)])
        own = {probe.op for probe in faulty.probes if probe.added_share is not None and probe.added_share > 1}
        assert own == {op}
        assert faulty.fault is not None
        assert faulty.fault.op == op
        inherited = next(probe for probe in faulty.probes if probe.name == "layer.2.output")
        assert not inherited.passed
        assert inherited.added is not None
        assert inherited.added < 1e-6 < 0.01 < (inherited.inherited or 0)


def test_a_small_fault_of_one_op_shows_where_inherited_errors_would_hide_it(subject: Subject) -> None:
    class Noise:
        """An error that is small beside what the tolerance of a whole layer allows."""

        def before(self, op: Op, memory: Memory) -> None:
            """No effect."""

        def after(self, op: Op, memory: Memory) -> None:
            if op.name == "layer.2.o":
                view = op.writes[-1]
                memory.write(view, memory.read(view) * (1 + 1.2e-5))

    report = check(subject.backend(), subject.truth, added=True, observers=[Noise()])
    probe = next(probe for probe in report.probes if probe.name == "layer.2.after_attention")
    assert probe.share < 1 < (probe.added_share or 0)
    assert not probe.passed
    assert not report.passed
    assert report.fault is not None
    assert report.fault.op == "layer.2.o"


def test_a_report_is_json_even_with_nan(subject: Subject) -> None:
    weights = subject.weights
    weights["layer.1.ffn_norm"] = np.full_like(weights["layer.1.ffn_norm"], np.nan)
    weights["layer.1.ffn_norm"].flags.writeable = False
    report = check(subject.backend(weights), subject.truth)
    text = json.dumps(report.to_dict(), allow_nan=False)
    entries = {entry["name"]: entry for entry in json.loads(text)["probes"]}
    assert entries["layer.1.ffn_norm"]["share"] is None
    assert not entries["layer.1.ffn_norm"]["passed"]
    assert entries["layer.0.output"]["passed"]
    assert report.fault is not None
    assert report.fault.op == "layer.1.gate_up"


def test_a_position_that_was_not_compared_fails(subject: Subject) -> None:
    class NoPromptLogits:
        """A backend whose `logits` calls no observer: prompt rows but the last have no logits."""

        def __init__(self) -> None:
            self._backend = subject.backend()

        def __getattr__(self, name: str) -> object:
            return getattr(self._backend, name)

        def logits(self, start: int, stop: int, observer: object = None) -> object:
            del observer
            return self._backend.logits(start, stop)

    report = check(NoPromptLogits(), subject.truth)  # type: ignore[arg-type]
    assert {probe.name for probe in report.probes if not probe.passed} == {"final_norm", "logits"}
    assert not report.passed


def test_a_geometry_that_transformers_refuses(tmp_path: Path) -> None:
    with pytest.raises(GroundTruthError, match=r"hidden size \(192\) is not a multiple of its 5 heads"):
        make_subject(tmp_path, three_layers(heads=5, kv_heads=5))


def test_a_context_that_is_too_short_is_refused(subject: Subject) -> None:
    with Engine.load(subject.checkpoint.path, "cpu", 8) as engine, pytest.raises(ContextError, match="24 tokens"):
        check(engine.backend, subject.truth)


def test_memory_is_read_by_copy_and_written_through(subject: Subject) -> None:
    class Doubler:
        def before(self, op: Op, memory: Memory) -> None:
            if op.name == "layer.1.qkv":
                view: View = op.residual  # type: ignore[attr-defined]
                held = memory.read(view)
                held *= 2
                assert not np.array_equal(held, memory.read(view))
                memory.write(view, held)
                np.testing.assert_array_equal(held, memory.read(view))

        def after(self, op: Op, memory: Memory) -> None:
            pass

    backend = subject.backend()
    head: Head = LAST_LOGITS
    backend.seek(0)
    backend.prefill(PROMPT, head)
    plain = backend.logits(0, 1)
    backend.seek(0)
    backend.observe(PROMPT, head, Doubler())
    assert not np.allclose(plain, backend.logits(0, 1))


def test_a_plot_is_drawn(subject: Subject, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    from numba_atomflow.utils.plot import check_plot
    from numba_atomflow.validate.plot import plot

    picture = tmp_path / "errors.png"
    check_plot(picture)
    plot(check(subject.backend(), subject.truth, observers=[SignFlip("layer.1.o")]), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match=r"errors\.png"):
        check_plot(tmp_path / "errors.nonsense")
