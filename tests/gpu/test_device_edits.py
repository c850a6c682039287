"""Edits by device functions on a GPU: what the same edits on the host do, in captured decode steps and in prompts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from edit_cases import EDITS, EditCase, check_edit
from numba import cuda
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.errors import OptionError
from numba_atomflow.logprobs import token_logprobs

PROMPT = list(range(5, 25))
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, speculate="off")
SAMPLED = replace(GREEDY, temperature=1.0, seed=1, logprobs=2)
LIMIT = 0.03  # nats: activations are float16, and random logits are up to about 5
DIRECTION = np.random.default_rng(0).standard_normal(192).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@cuda.jit(device=True)
def same(row: Any, column: Any, _position: Any) -> Any:
    return row[column]


@cuda.jit(device=True)
def double(row: Any, column: Any, _position: Any) -> Any:
    return row[column] * np.float32(2)


@cuda.jit(device=True)
def steer(row: Any, column: Any, position: Any) -> Any:
    return row[column] + DIRECTION[column] if position > 21 else row[column]


@cuda.jit(device=True)
def not_a_number(row: Any, column: Any, position: Any) -> Any:
    return row[column] if position < 22 else np.float32(np.nan)


@cuda.jit(device=True)
def half_forbidden(row: Any, column: Any, _position: Any) -> Any:
    return row[column] if column < 144 else -np.inf


@pytest.fixture
def engine(engine_of_each_path: Engine) -> Engine:
    return engine_of_each_path


@pytest.fixture(scope="module")
def graph_engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cuda", 96, decode="graph") as engine:
        yield engine


def tokens_of(engine: Engine, params: SamplingParams = GREEDY) -> list[int]:
    return engine.generate_tokens(PROMPT, params).finish().token_ids


@pytest.mark.parametrize("case", EDITS, ids=str)
def test_the_kernel(case: EditCase) -> None:
    check_edit(case)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_functions_that_change_nothing_change_no_token(graph_engine: Engine, params: SamplingParams) -> None:
    graph_engine.reset()  # a part of the prompt in the KV cache would leave less to compute, in other kernels
    plain = graph_engine.generate_tokens(PROMPT, params).finish()
    with graph_engine.edit({"layer.*.output": same, "layer.0.[qkv]": same, "layer.1.ffn": same, "logits": same}):
        edited = graph_engine.generate_tokens(PROMPT, params).finish()
    assert (edited.token_ids, edited.logprobs) == (plain.token_ids, plain.logprobs)


@pytest.mark.parametrize("name", ["embedding", "layer.0.k", "layer.1.q", "layer.1.attention", "layer.0.ffn", "logits"])
def test_a_device_function_has_the_effect_of_the_same_on_the_host(graph_engine: Engine, name: str) -> None:
    engine = graph_engine
    with engine.edit({name: lambda rows, _position: rows * np.float32(2)}):
        expected = tokens_of(engine), engine.feed([9])
    with engine.edit({name: double}):
        assert tokens_of(engine) == expected[0]
        np.testing.assert_array_equal(engine.feed([9]), expected[1])


def test_each_way_of_decoding_is_steered(engine: Engine) -> None:
    """How likely the tokens of a steered reply were is what the same edit on the host makes of them as a prompt."""

    def steered(rows: NDArray[np.float32], position: int) -> NDArray[np.float32]:
        later = (position + np.arange(len(rows)))[:, None] > 21
        return np.where(later, rows + DIRECTION, rows)

    plain = tokens_of(engine)
    with engine.edit({"layer.0.output": steer}):
        reply = engine.generate_tokens(PROMPT, SAMPLED).finish()
        assert tokens_of(engine) != plain
    with engine.edit({"layer.0.output": steered}):
        engine.reset()
        logits = engine.feed(PROMPT + reply.token_ids[:-1], all_logits=True)[len(PROMPT) - 1 :]
    for row, token, entry in zip(logits, reply.token_ids, reply.logprobs, strict=True):
        assert entry.logprob == pytest.approx(token_logprobs(row, token, 0).logprob, abs=LIMIT)
    assert tokens_of(engine) == plain


def test_device_and_host_functions_in_one_step(graph_engine: Engine) -> None:
    with graph_engine.edit({"layer.0.output": double, "layer.1.q": lambda rows, _position: rows * np.float32(0.5)}):
        mixed = tokens_of(graph_engine)
    with (
        graph_engine.edit({"layer.0.output": lambda rows, _position: rows * np.float32(2)}),
        graph_engine.edit({"layer.1.q": lambda rows, _position: rows * np.float32(0.5)}),
    ):
        assert tokens_of(graph_engine) == mixed
    with graph_engine.edit({"layer.0.output": double}), graph_engine.edit({"layer.0.output": double}):
        twice = tokens_of(graph_engine)
    with graph_engine.edit({"layer.0.output": lambda rows, _position: rows * np.float32(4)}):
        assert tokens_of(graph_engine) == twice


def test_forbidden_tokens_are_never_drawn(engine: Engine) -> None:
    with engine.edit({"logits": half_forbidden}):
        assert max(tokens_of(engine, replace(SAMPLED, max_tokens=40, temperature=5.0))) < 144


def test_what_is_not_finite_is_the_functions_fault(engine: Engine) -> None:
    plain = tokens_of(engine)
    with (
        engine.edit({"layer.0.output": not_a_number}),
        pytest.raises(OptionError, match=r"edit of layer\.0\.output returned NaN"),
    ):
        tokens_of(engine)
    assert tokens_of(engine) == plain


def test_prompts_on_the_gemm_path(graph_engine: Engine) -> None:
    prompt = np.random.default_rng(1).integers(3, 288, 70).tolist()
    assert isinstance(graph_engine.backend, CudaBackend)
    for name in ("layer.0.output", "layer.0.ffn", "layer.1.v"):
        with graph_engine.edit({name: lambda rows, _position: rows * np.float32(2)}):
            graph_engine.reset()
            expected = graph_engine.feed(prompt)
        with graph_engine.edit({name: double}):
            graph_engine.reset()
            np.testing.assert_array_equal(graph_engine.feed(prompt), expected)
