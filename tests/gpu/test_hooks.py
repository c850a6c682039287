"""Captured and edited activations on a GPU, on both ways of decoding: those of the CPU, and no trace afterwards."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from closeness import relative_l2
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams, research
from numba_atomflow.model.activations import activations

PROMPT = list(range(5, 25))
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture
def engine(engine_of_each_path: Engine) -> Engine:
    return engine_of_each_path


@pytest.fixture(scope="module")
def oracle() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cpu", 96) as engine:
        yield engine


def double(rows: NDArray[np.float32], _position: int) -> NDArray[np.float32]:
    return rows * 2


def tokens_of(engine: Engine) -> list[int]:
    return engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids


def test_captured_activations_are_those_of_the_cpu(engine: Engine, oracle: Engine) -> None:
    expected = oracle.capture(PROMPT, "*")
    for name, rows in engine.capture(PROMPT, "*").items():
        assert rows.dtype == np.float32
        assert relative_l2(rows, expected[name]) < 1e-2, name
    assert engine.token_ids == PROMPT


def test_logit_lens_and_attention_weights_are_those_of_the_cpu(engine: Engine, oracle: Engine) -> None:
    for function, arguments in ((research.logit_lens, ()), (research.attention_weights, (1,))):
        compute: Any = function
        assert relative_l2(compute(engine, PROMPT, *arguments), compute(oracle, PROMPT, *arguments)) < 1e-2


def test_edits_that_change_nothing_change_no_token(engine: Engine) -> None:
    plain = tokens_of(engine)
    editable = [each.name for each in activations(engine.geometry) if not each.instead]
    with engine.edit(dict.fromkeys(editable, lambda rows, _position: rows)):
        assert tokens_of(engine) == plain


@pytest.mark.parametrize("name", ["embedding", "layer.0.k", "layer.1.q", "layer.1.attention", "layer.0.ffn", "logits"])
def test_an_edit_has_the_effect_that_it_has_on_the_cpu(engine: Engine, oracle: Engine, name: str) -> None:
    engine.reset()
    plain = engine.feed([*PROMPT, 9])
    with engine.edit({name: double}), oracle.edit({name: double}):
        engine.reset()
        oracle.reset()
        for token_ids in (PROMPT, [9]):  # chunks of a prompt, and a single token
            edited = engine.feed(token_ids)
            assert relative_l2(edited, oracle.feed(token_ids)) < 2e-2
        assert relative_l2(edited, plain) > 2e-2
    engine.reset()
    np.testing.assert_array_equal(engine.feed([*PROMPT, 9]), plain)


def test_decode_steps_run_under_edits_and_not_afterwards(engine: Engine) -> None:
    plain = tokens_of(engine)
    seen: list[tuple[int, int]] = []

    def forbid(rows: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        seen.append((position, len(rows)))
        changed = rows.copy()
        changed[:, plain] = -np.inf
        return changed

    with engine.edit({"logits": forbid}):
        assert not set(tokens_of(engine)) & set(plain)
    assert seen == [(position, 1) for position in range(19, 31)]
    assert tokens_of(engine) == plain


def test_a_function_that_raises_leaves_the_engine_usable(engine: Engine) -> None:
    plain = tokens_of(engine)

    def fail(_rows: NDArray[np.float32], position: int) -> None:
        if position == 22:
            raise RuntimeError("my own fault")

    with engine.edit({"layer.0.output": fail}), pytest.raises(RuntimeError, match="my own fault"):
        tokens_of(engine)
    assert tokens_of(engine) == plain
