"""`Engine.capture` and `Engine.edit` on tiny models: names, values, and what the KV cache keeps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_checkpoint

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory
from numba_atomflow.errors import ClosedError, ContextError, EngineBusyError, OptionError
from numba_atomflow.model.activations import activations
from numba_atomflow.model.step import LAST_LOGITS, Op

Rows = NDArray[np.float32]
GEOMETRY = tiny_geometry(layers=3, vocabulary=SMALLEST_VOCABULARY, max_positions=1024)
PROMPT = np.random.default_rng(0).integers(3, SMALLEST_VOCABULARY, 20).tolist()
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("hooks"), GEOMETRY)


@pytest.fixture
def engine(three_layers: Path) -> Iterator[Engine]:
    with Engine.load(three_layers, "cpu", threads=1) as engine:
        yield engine


def nothing(_rows: Rows, _position: int) -> None:
    """An edit that changes nothing."""


def zero(rows: Rows, _position: int) -> Rows:
    return np.zeros_like(rows)


def tokens_of(engine: Engine, params: SamplingParams = GREEDY) -> list[int]:
    return engine.generate_tokens(PROMPT, params).finish().token_ids


# --- capture ---------------------------------------------------------------------------------------------------------


def test_names_and_globs_choose_activations_of_a_step_in_order(engine: Engine) -> None:
    captured = engine.capture(PROMPT, ["logits", "layer.*.output", "layer.[12].ffn", "embedding"])
    assert {name: rows.shape for name, rows in captured.items()} == {
        "embedding": (20, GEOMETRY.hidden),
        "layer.0.output": (20, GEOMETRY.hidden),
        "layer.1.ffn": (20, GEOMETRY.ffn),
        "layer.1.output": (20, GEOMETRY.hidden),
        "layer.2.ffn": (20, GEOMETRY.ffn),
        "layer.2.output": (20, GEOMETRY.hidden),
        "logits": (20, GEOMETRY.vocabulary),
    }
    assert all(rows.dtype == np.float32 for rows in captured.values())
    assert list(captured) == [each.name for each in activations(GEOMETRY) if each.name in captured]


def test_everything_that_is_captured_fits_together(engine: Engine) -> None:
    a = engine.capture(PROMPT, "*")
    assert set(a) == {each.name for each in activations(GEOMETRY)}
    g = GEOMETRY
    stream = a["embedding"]
    for i in range(g.layers):
        layer = f"layer.{i}."
        np.testing.assert_allclose(a[layer + "input_norm"].std(), 1, rtol=0.2)
        values = a[layer + "v"].reshape(20, g.kv_heads, g.head_dim)
        first = np.repeat(values[0], g.gqa_ratio, axis=0).reshape(-1)  # the first token attends to itself alone
        np.testing.assert_allclose(a[layer + "attention"][0], first, rtol=1e-6)
        np.testing.assert_array_equal(a[layer + "mlp"], a[layer + "output"] - a[layer + "after_attention"])
        assert not np.array_equal(a[layer + "after_attention"], stream)
        stream = a[layer + "output"]
    engine.reset()
    np.testing.assert_array_equal(a["logits"], engine.feed(PROMPT, all_logits=True))


def test_a_prompt_of_several_chunks_is_captured_whole_and_stays_in_the_kv_cache(engine: Engine) -> None:
    prompt = np.random.default_rng(1).integers(3, SMALLEST_VOCABULARY, 600).tolist()
    assert len(prompt) > engine.backend.prefill_chunk
    captured = engine.capture(prompt, ["layer.1.k", "layer.2.output", "final_norm"])
    assert engine.token_ids == prompt
    following = engine.feed([7])
    engine.reset()
    engine.feed(prompt[:590])
    np.testing.assert_array_equal(engine.feed([*prompt[590:], 7]).argmax(), following.argmax())
    parts = engine.capture(prompt[:100], ["layer.1.k", "layer.2.output", "final_norm"])
    for name, rows in parts.items():
        assert np.isfinite(captured[name]).all()
        np.testing.assert_allclose(captured[name][:100], rows, rtol=1e-4, atol=1e-5)


def test_a_text_is_captured_by_its_tokens(engine: Engine) -> None:
    captured = engine.capture("abc", "embedding")
    np.testing.assert_array_equal(
        captured["embedding"], engine.capture(engine.text.encode("abc"), "embedding")["embedding"]
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer.1.atention"], "'layer.1.atention'.*layers 0 to 2; the nearest names are layer.1.attention,"),
        (["layer.3.output"], "'layer.3.output'.*layers 0 to 2; the nearest names are layer.*output"),
        (["!"], "nearest names are embedding, layer.0.output, logits"),
        ([], "No activation is named"),
        ([3], "list of names"),
        (5, "list of names"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(engine: Engine, names: Any, message: str) -> None:
    engine.feed(PROMPT)
    with pytest.raises(OptionError, match=message):
        engine.capture(PROMPT, names)
    assert engine.position == len(PROMPT)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(engine: Engine) -> None:
    engine.feed(PROMPT)
    with pytest.raises(ContextError):
        engine.capture([5] * 1025, ["logits"])
    with pytest.raises(OptionError):
        engine.capture([], ["logits"])
    assert engine.position == len(PROMPT)


# --- edit: values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_edits_that_change_nothing_leave_every_bit(engine: Engine, params: SamplingParams) -> None:
    plain, logits = tokens_of(engine, params), engine.feed([9])
    editable = {each.name: nothing for each in activations(GEOMETRY) if not each.instead}
    with engine.edit(editable):
        assert tokens_of(engine, params) == plain
        np.testing.assert_array_equal(engine.feed([9]), logits)
    with engine.edit(dict.fromkeys(editable, lambda rows, _position: rows)):
        assert tokens_of(engine, params) == plain
        np.testing.assert_array_equal(engine.feed([9]), logits)


@pytest.mark.parametrize(
    "name", [each.name for each in activations(GEOMETRY) if not each.instead and each.name != "logits"]
)
def test_an_edit_of_any_activation_reaches_the_logits_and_leaves_earlier_ones(engine: Engine, name: str) -> None:
    plain = engine.capture(PROMPT, "*")
    with engine.edit({name: lambda rows, _position: rows * 1.5 + 0.25}):
        edited = engine.capture(PROMPT, "*")
    order = [each.name for each in activations(GEOMETRY)]
    expected = plain[name] * np.float32(1.5) + np.float32(0.25)
    np.testing.assert_allclose(edited[name], expected, rtol=1e-6)
    for before in order[: order.index(name)]:
        if before.rpartition(".")[0] != name.rpartition(".")[0]:  # of one op or layer: q before k, mlp before output
            np.testing.assert_array_equal(edited[before], plain[before])
    assert not np.allclose(edited["logits"], plain["logits"], atol=1e-3)


def test_an_edit_gets_every_position_once_in_prompt_and_reply(engine: Engine) -> None:
    seen: list[tuple[int, int]] = []

    def note(rows: Rows, position: int) -> None:
        assert rows.shape[1] == GEOMETRY.hidden
        seen.append((position, len(rows)))

    prompt = [5] * 600
    with engine.edit({"layer.1.output": note}):
        engine.generate_tokens(prompt, GREEDY).finish()
    assert seen == [(0, 512), (512, 88), *((600 + i, 1) for i in range(7))]


def test_logits_are_edited_where_they_are_computed_and_minus_infinity_forbids_a_token(engine: Engine) -> None:
    plain = tokens_of(engine)
    seen: list[int] = []

    def forbid(rows: Rows, position: int) -> Rows:
        seen.extend(range(position, position + len(rows)))
        changed = rows.copy()
        changed[:, plain] = -np.inf
        return changed

    with engine.edit({"logits": forbid}):
        for params in (GREEDY, DRAWN):
            assert not set(tokens_of(engine, params)) & set(plain)
        assert seen[:8] == list(range(19, 27))
        seen.clear()
        engine.reset()
        all_logits = engine.feed(PROMPT, all_logits=True)
        assert seen == list(range(20))
        assert (all_logits[:, plain] == np.float32(-1e30)).all()


def test_patching_a_whole_layer_gives_the_other_prompt_s_logits(engine: Engine) -> None:
    other = PROMPT[::-1]
    source = engine.capture(other, ["layer.2.output", "logits"])
    with engine.edit({"layer.2.output": lambda rows, at: source["layer.2.output"][at : at + len(rows)]}):
        patched = engine.capture(PROMPT, ["logits"])
    np.testing.assert_array_equal(patched["logits"], source["logits"])


def test_without_values_attention_adds_nothing(engine: Engine) -> None:
    with engine.edit({"layer.*.v": zero}):
        captured = engine.capture(PROMPT, ["layer.*.attention", "layer.1.after_attention", "layer.0.output"])
    assert not captured["layer.2.attention"].any()
    np.testing.assert_array_equal(captured["layer.1.after_attention"], captured["layer.0.output"])


# --- edit: what holds when -------------------------------------------------------------------------------------------


def test_nested_edits_run_from_the_outer_to_the_inner_and_end_one_by_one(engine: Engine) -> None:
    plain = engine.capture(PROMPT, "embedding")["embedding"]

    def embedding() -> Rows:
        return engine.capture(PROMPT, "embedding")["embedding"]

    with engine.edit({"embedding": lambda rows, _position: rows + 1, "embeddin?": lambda rows, _position: rows * 2}):
        np.testing.assert_array_equal(embedding(), (plain + np.float32(1)) * np.float32(2))
        with engine.edit({"embedding": lambda rows, _position: rows - 3}):
            np.testing.assert_array_equal(embedding(), (plain + np.float32(1)) * np.float32(2) - np.float32(3))
        np.testing.assert_array_equal(embedding(), (plain + np.float32(1)) * np.float32(2))
    np.testing.assert_array_equal(embedding(), plain)


def test_blocks_that_do_not_end_in_order_are_undone_each_by_itself(engine: Engine) -> None:
    plain = engine.capture(PROMPT, "embedding")["embedding"]
    outer, inner = engine.edit({"embedding": zero}), engine.edit({"embedding": lambda rows, _position: rows + 1})
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    np.testing.assert_array_equal(engine.capture(PROMPT, "embedding")["embedding"], plain + np.float32(1))
    inner.__exit__(None, None, None)
    np.testing.assert_array_equal(engine.capture(PROMPT, "embedding")["embedding"], plain)


def test_a_prompt_s_prefix_is_not_shared_between_edited_and_plain(engine: Engine) -> None:
    plain = tokens_of(engine)
    with engine.edit({"layer.0.output": zero}):
        first = engine.generate_tokens(PROMPT, GREEDY).finish()
        again = engine.generate_tokens(PROMPT, GREEDY).finish()
        assert (first.stats.reused_tokens, again.stats.reused_tokens) == (0, len(PROMPT) - 1)
        assert first.token_ids == again.token_ids != plain
        with engine.edit({"layer.0.output": nothing}):
            inner = engine.generate_tokens(PROMPT, GREEDY).finish()
            assert (inner.stats.reused_tokens, inner.token_ids) == (0, first.token_ids)
        assert engine.position == 0
    after = engine.generate_tokens(PROMPT, GREEDY).finish()
    assert (after.stats.reused_tokens, after.token_ids) == (0, plain)


def test_fed_tokens_go_on_from_a_plain_prefix_which_stays(engine: Engine) -> None:
    engine.feed(PROMPT)
    plain = engine.feed([9])
    engine.rewind(len(PROMPT))
    with engine.edit({"layer.2.output": zero}):
        edited = engine.feed([9, 10])
        assert engine.position == len(PROMPT) + 2
    assert engine.position == len(PROMPT)
    assert not np.allclose(edited, plain)
    np.testing.assert_array_equal(engine.feed([9]), plain)


def test_proposed_tokens_are_verified_one_by_one_under_edits(engine: Engine) -> None:
    with engine.edit({"layer.0.output": zero}):
        expected = engine.feed([*PROMPT, 9])
        engine.rewind(len(PROMPT))
        assert engine.backend.verification.width == 1
        np.testing.assert_array_equal(engine.backend.verify([9])[0], expected)
        np.testing.assert_array_equal(engine.feed([9]), expected)
        with pytest.raises(IndexError):
            engine.backend.verify([9, 9])


def test_speculation_is_off_under_edits(engine: Engine) -> None:
    repeated = PROMPT[:6] * 5
    with engine.edit({"layer.0.output": zero}):
        reply = engine.generate_tokens(repeated, GREEDY).finish()
        assert reply.stats.proposed == 0
        with pytest.raises(OptionError, match="activations are being edited"):
            engine.generate_tokens(repeated, replace(GREEDY, speculate="lookup"))


def test_a_snapshot_keeps_what_was_computed_under_edits(engine: Engine) -> None:
    engine.feed(PROMPT)
    plain = engine.snapshot()
    with engine.edit({"layer.0.output": zero}):
        engine.reset()
        expected = engine.feed(PROMPT)
        engine.rewind(len(PROMPT) - 1)
        edited = engine.snapshot()
    assert engine.position == 0
    engine.restore(edited)
    assert engine.token_ids == PROMPT[:-1]
    assert not np.allclose(engine.feed(PROMPT[-1:]), expected)
    with engine.edit({"layer.0.output": zero}):
        engine.restore(edited)
        np.testing.assert_allclose(engine.feed(PROMPT[-1:]), expected, rtol=1e-4, atol=1e-5)
        engine.restore(plain)
        assert engine.generate_tokens(PROMPT, GREEDY).finish().stats.reused_tokens == 0
    with engine.edit({"layer.0.output": zero}):
        engine.restore(plain)
    assert engine.token_ids == PROMPT


def test_a_generation_does_not_outlive_its_edits(engine: Engine) -> None:
    generation = engine.generate_tokens(PROMPT, GREEDY)
    next(generation)
    with engine.edit({"layer.0.output": zero}):
        assert generation.finish_reason == "interrupted"
        edited = engine.generate_tokens(PROMPT, GREEDY)
        next(edited)
    assert edited.finish_reason == "interrupted"
    assert list(edited) == []
    assert engine.position == 0


def test_chat_runs_under_edits(engine: Engine) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    plain = engine.chat(messages, GREEDY).finish().token_ids
    with engine.edit({"layer.0.output": zero}):
        assert engine.chat(messages, GREEDY).finish().token_ids != plain
    assert engine.chat(messages, GREEDY).finish().token_ids == plain


def test_scores_and_replies_with_logprobs_run_under_edits(engine: Engine) -> None:
    plain = engine.score(PROMPT, [5, 6, 7])
    with_logprobs = replace(DRAWN, logprobs=2, prompt_logprobs=1)
    with engine.edit({"layer.0.output": zero}):
        edited = engine.score(PROMPT, [5, 6, 7])
        assert edited != plain
        logits = engine.capture([*PROMPT, 5, 6], ["logits"])["logits"][-3:].astype(np.float64)
        expected = logits[range(3), [5, 6, 7]] - np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_allclose(edited.logprobs, expected, rtol=1e-4)
        assert engine.score_many([(PROMPT, [5, 6, 7]), (PROMPT, [8])])[0].logprob == pytest.approx(edited.logprob)
        tokens = tokens_of(engine, DRAWN)
        reply = engine.generate_tokens(PROMPT, with_logprobs).finish()
        assert reply.token_ids == tokens
        assert len(reply.logprobs) == len(tokens)
    assert engine.score(PROMPT, [5, 6, 7]) == plain


def test_an_exception_of_a_function_ends_the_call_and_the_block(engine: Engine) -> None:
    plain = tokens_of(engine)
    calls: list[int] = []

    def fail(_rows: Rows, position: int) -> None:
        calls.append(position)
        if position == len(PROMPT) + 2:
            raise RuntimeError("my own fault")

    with pytest.raises(RuntimeError, match="my own fault"), engine.edit({"layer.1.q": fail}):
        tokens_of(engine)
    assert calls[-1] == len(PROMPT) + 2
    assert tokens_of(engine) == plain


def test_after_an_exception_within_the_block_the_next_generation_is_right(engine: Engine) -> None:
    fail_at = {len(PROMPT) + 2}

    def fail_once(rows: Rows, position: int) -> Rows:
        if position in fail_at:
            fail_at.clear()
            raise RuntimeError("my own fault")
        return rows * 2

    with engine.edit({"layer.1.q": lambda rows, _position: rows * 2}):
        expected = tokens_of(engine)
    with engine.edit({"layer.1.q": fail_once}):
        with pytest.raises(RuntimeError, match="my own fault"):
            tokens_of(engine)
        assert tokens_of(engine) == expected


def test_an_engine_may_be_closed_inside_of_a_block(three_layers: Path) -> None:
    with Engine.load(three_layers, "cpu", threads=1) as engine, engine.edit({"layer.0.output": zero}):
        engine.close()
    with pytest.raises(ClosedError), engine.edit({"layer.0.output": zero}):
        pass


def test_a_function_cannot_call_the_engine(engine: Engine) -> None:
    with engine.edit({"layer.0.output": lambda _rows, _position: engine.feed([1])}), pytest.raises(EngineBusyError):
        engine.feed(PROMPT)


# --- edit: what is refused -------------------------------------------------------------------------------------------


def of_another_shape(rows: Rows, _position: int) -> Rows:
    return rows[:, :-1]


def changed_in_place(rows: Rows, _position: int) -> None:
    rows[:, 0] = 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (of_another_shape, r"edit of layer.1.output returned float32 \[20, 191\]; .*shape \[20, 192\]"),
        (lambda rows, _position: rows * np.nan, "NaN, infinity"),
        (lambda rows, _position: np.where(rows > 0, np.inf, rows), "NaN, infinity"),
        (lambda rows, _position: rows.astype(np.float64) * 1e300, "too large for float32"),
        (lambda rows, _position: rows.astype(str), "returned <U32"),
        (lambda _rows, _position: "text", "returned <U4"),
    ],
)
def test_what_a_function_returns_is_checked(engine: Engine, function: Callable[..., Any], message: str) -> None:
    with engine.edit({"layer.1.output": function}), pytest.raises(OptionError, match=message):
        engine.feed(PROMPT)


def test_logits_that_forbid_every_token_are_refused(engine: Engine) -> None:
    def first_half(rows: Rows, _position: int) -> Rows:
        return np.where(np.arange(rows.shape[-1]) < rows.shape[-1] // 2, -np.inf, rows)

    def second_half(rows: Rows, _position: int) -> Rows:
        return np.where(np.arange(rows.shape[-1]) < rows.shape[-1] // 2, rows, -np.inf)

    with engine.edit({"logits": first_half}):
        engine.feed(PROMPT)
        with engine.edit({"logits": second_half}), pytest.raises(OptionError, match=r"edit of logits .* every token"):
            engine.feed(PROMPT[:1])


def test_a_change_in_place_is_refused_as_it_would_be_lost(engine: Engine) -> None:
    with engine.edit({"layer.1.output": changed_in_place}), pytest.raises(ValueError, match="read-only"):
        engine.feed(PROMPT)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"layer.0.input_norm": zero}, "layer.0.input_norm can be captured.*edit embedding"),
        ({"layer.2.input_norm": zero}, "edit layer.1.output"),
        ({"layer.2.ffn_norm": zero}, "edit layer.2.after_attention"),
        ({"layer.2.mlp": zero}, "edit layer.2.ffn"),
        ({"final_norm": zero}, "edit layer.2.output"),
        ({"layer.2.outputs": zero}, "nearest names are layer.2.output,"),
        ({"layer.2.output": 2.0}, "'layer.2.output' is no function"),
        ({}, "at least one entry"),
        ([zero], "mapping from names"),
    ],
)
def test_edits_that_cannot_be_are_refused_and_change_nothing(engine: Engine, edits: Any, message: str) -> None:
    engine.feed(PROMPT)
    with pytest.raises(OptionError, match=message), engine.edit(edits):
        pass
    assert engine.position == len(PROMPT)


# --- names -----------------------------------------------------------------------------------------------------------


def test_each_op_of_a_step_has_an_activation(engine: Engine) -> None:
    class Ops:
        def __init__(self) -> None:
            self.names: list[str] = []

        def before(self, op: Op, _memory: Memory) -> None:
            self.names.append(op.name)

        def after(self, op: Op, memory: Memory) -> None:
            """No effect."""

    ops = Ops()
    engine.backend.observe([5], LAST_LOGITS, ops)
    assert set(ops.names) - {each.op for each in activations(GEOMETRY)} == {"advance"}
    order = [ops.names.index(each.op) for each in activations(GEOMETRY)]
    assert all(before <= after for before, after in pairwise(order))
