"""`Engine.unembed`, logit lens and attention weights on tiny models, against the model's own results."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_checkpoint

from numba_atomflow import Engine, SamplingParams, research
from numba_atomflow.errors import OptionError

GEOMETRY = tiny_geometry(layers=3, heads=6, kv_heads=2, vocabulary=SMALLEST_VOCABULARY, max_positions=1024)
PROMPT = np.random.default_rng(0).integers(3, SMALLEST_VOCABULARY, 20).tolist()


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("research"), GEOMETRY)


@pytest.fixture
def engine(three_layers: Path) -> Iterator[Engine]:
    with Engine.load(three_layers, "cpu", threads=1) as engine:
        yield engine


# --- unembed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 20, 600])  # one row; blocks of the head; more than a prefill chunk
def test_the_last_layer_s_output_gives_the_model_s_logits(engine: Engine, tokens: int) -> None:
    prompt = (PROMPT * 30)[:tokens]
    captured = engine.capture(prompt, ["layer.2.output", "logits"])
    np.testing.assert_allclose(engine.unembed(captured["layer.2.output"]), captured["logits"], rtol=1e-4, atol=1e-5)
    assert engine.token_ids == prompt


def test_a_generation_goes_on_after_it(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected = engine.generate_tokens(PROMPT, params).finish().token_ids
    generation = engine.generate_tokens(PROMPT, params)
    for _ in generation:
        engine.unembed(np.ones((3, GEOMETRY.hidden)))
    assert generation.token_ids == expected


def test_edits_have_no_effect_on_it(engine: Engine) -> None:
    rows = np.ones((2, GEOMETRY.hidden), np.float32)
    plain = engine.unembed(rows)
    with engine.edit({"logits": lambda logits, _position: logits * 0}):
        np.testing.assert_array_equal(engine.unembed(rows), plain)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.ones(192), r"float64 \[192\]; it must be numbers of shape \[n, 192\]"),
        (np.ones((2, 191)), r"\[2, 191\]"),
        (np.ones((0, 192)), r"\[0, 192\]"),
        ([["a"] * 192], "numbers"),
        (np.full((1, 192), np.nan), "NaN"),
    ],
)
def test_rows_that_are_no_stream_are_refused(engine: Engine, rows: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        engine.unembed(rows)


# --- logit lens ------------------------------------------------------------------------------------------------------


def test_the_lens_has_a_row_after_each_layer_and_ends_with_the_model_s_logits(engine: Engine) -> None:
    lens = research.logit_lens(engine, PROMPT)
    assert lens.shape == (4, GEOMETRY.vocabulary)
    captured = engine.capture(PROMPT, ["embedding", "layer.0.output", "logits"])
    np.testing.assert_allclose(lens[-1], captured["logits"][-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens[0], engine.unembed(captured["embedding"][-1:])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lens[1], engine.unembed(captured["layer.0.output"][-1:])[0], rtol=1e-4, atol=1e-5)
    third = research.logit_lens(engine, PROMPT, position=2)
    np.testing.assert_allclose(third[-1], captured["logits"][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [20, -21])
def test_a_position_outside_of_the_prompt_is_refused(engine: Engine, position: int) -> None:
    with pytest.raises(OptionError, match=f"position is {position}, but the prompt has 20 tokens"):
        research.logit_lens(engine, PROMPT, position)


# --- attention weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
def test_weights_times_values_are_what_the_model_s_attention_gave(engine: Engine, layer: int) -> None:
    g = GEOMETRY
    captured = engine.capture(PROMPT, [f"layer.{layer}.v", f"layer.{layer}.attention"])
    weights = research.attention_weights(engine, PROMPT, layer)
    assert weights.shape == (g.heads, 20, 20)
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-6)
    assert not np.triu(weights, 1).any()
    values = captured[f"layer.{layer}.v"].reshape(20, g.kv_heads, g.head_dim).repeat(g.gqa_ratio, axis=1)
    result = np.einsum("hij,jhd->ihd", weights, values).reshape(20, g.q_dim)
    np.testing.assert_allclose(result, captured[f"layer.{layer}.attention"], rtol=1e-4, atol=1e-5)


def test_heads_are_chosen_in_any_order(engine: Engine) -> None:
    every = research.attention_weights(engine, PROMPT, 1)
    np.testing.assert_array_equal(research.attention_weights(engine, PROMPT, 1, heads=[5, 0]), every[[5, 0]])


@pytest.mark.parametrize(("layer", "heads"), [(3, None), (-1, None), (0, [6]), (0, [-1])])
def test_layers_and_heads_that_do_not_exist_are_refused(engine: Engine, layer: int, heads: list[int] | None) -> None:
    with pytest.raises(OptionError, match="this model has 0 to"):
        research.attention_weights(engine, PROMPT, layer, heads)
