"""Draft models on a GPU: two engines of one device and context, and the same replies with and without."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from device_launch import capability
from step_costs import with_cheap_draft
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.cuda.backend import CudaBackend

TARGET = tiny_geometry(
    layers=3, hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocabulary=4096, max_positions=512
)
PROMPT = list(range(5, 60))

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture(autouse=True, scope="module")
def _bulk_copies() -> None:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have), and checks no proposed tokens")


@pytest.fixture(scope="module")
def target() -> Iterator[Engine]:
    with Engine.random(TARGET, "cuda", 512) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _no_draft_afterwards(target: Engine) -> Iterator[None]:
    yield
    target.use_draft(None)


@pytest.fixture(scope="module", params=["itself", "smaller", "graph"])
def draft(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The target once more; a model of one layer; and the target with decode steps as a graph, on a shorter context."""
    geometry = replace(TARGET, layers=1) if request.param == "smaller" else TARGET
    is_graph = request.param == "graph"
    with Engine.random(geometry, "cuda", 128 if is_graph else 512, decode="graph" if is_graph else "auto") as engine:
        yield engine


def test_two_engines_have_one_context_and_memory_of_their_own(target: Engine, draft: Engine) -> None:
    one, other = target.backend, draft.backend
    assert isinstance(one, CudaBackend)
    assert isinstance(other, CudaBackend)
    assert one._gpu is other._gpu
    first, second = (
        sorted((view.address, view.address + view.extent) for view in backend._model.buffers.values())
        for backend in (one, other)
    )
    assert first[-1][1] <= second[0][0] or second[-1][1] <= first[0][0]


def test_engines_that_decode_by_turns_get_their_own_tokens(target: Engine, draft: Engine) -> None:
    """Steps that ran ahead of one are still running when the other launches its own."""
    params = SamplingParams(max_tokens=60)
    engines, replies = (target, draft), []
    for engine in engines:
        engine.reset()
        replies.append(engine.generate_tokens(PROMPT, params).finish().token_ids)
        engine.reset()
    generations = [engine.generate_tokens(PROMPT, params) for engine in engines]
    mixed = list(zip(*generations, strict=True))
    assert [list(tokens) for tokens in zip(*mixed, strict=True)] == replies


@pytest.mark.parametrize(("temperature", "logprobs"), [(0.0, None), (0.0, 2), (0.8, None)])
def test_a_reply_is_the_same_with_a_draft_model(
    target: Engine, draft: Engine, temperature: float, logprobs: int | None
) -> None:
    target.reset()
    params = SamplingParams(max_tokens=120, temperature=temperature, seed=3, logprobs=logprobs)
    plain = target.generate_tokens(PROMPT, replace(params, speculate="off")).finish()
    engine = with_cheap_draft(target, draft)
    for turn in range(3):  # the first after an empty KV cache of both, the others by prefix hits
        reply = engine.generate_tokens(PROMPT, params).finish()
        assert len(reply.token_ids) == 120
        if turn == 0:
            assert reply.token_ids == plain.token_ids
            assert reply.stats.proposed > 0
        if temperature == 0.0 and draft.geometry == TARGET:
            assert reply.stats.accepted > 0.8 * reply.stats.proposed > 0


def test_the_target_goes_on_when_its_draft_is_closed(target: Engine) -> None:
    target.reset()
    params = SamplingParams(max_tokens=40)
    plain = target.generate_tokens(PROMPT, params).finish().token_ids
    with Engine.random(replace(TARGET, layers=1), "cuda", 128) as draft:
        engine = with_cheap_draft(target, draft)
        assert engine.generate_tokens(PROMPT, params).finish().token_ids == plain
    engine.use_draft(None)
    engine.reset()
    assert engine.generate_tokens(PROMPT, params).finish().token_ids == plain
