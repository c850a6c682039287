"""Snapshots of a GPU's KV cache: the next tokens are those that followed, on both ways of decoding."""

from pathlib import Path

import pytest

from numba_atomflow import Engine, SamplingParams

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)

pytestmark = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPerformanceWarning")


@pytest.fixture
def engine(engine_of_each_path: Engine) -> Engine:
    return engine_of_each_path


def test_the_next_tokens_are_those_that_followed(engine: Engine, tmp_path: Path) -> None:
    engine.reset()
    engine.feed(PROMPT)
    snapshot = engine.snapshot()
    assert snapshot.keys.dtype == "float16"
    engine.save_state(tmp_path / "state.kv")
    expected = engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids
    for restore in (lambda: engine.restore(snapshot), lambda: engine.load_state(tmp_path / "state.kv")):
        engine.feed([1, 2, 3])
        restore()
        assert engine.snapshot().keys.tobytes() == snapshot.keys.tobytes()
        assert engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids == expected


def test_a_snapshot_in_the_middle_of_a_generation_that_runs_ahead(engine: Engine) -> None:
    engine.reset()
    expected = engine.generate_tokens(PROMPT, SAMPLED).finish().token_ids
    engine.reset()
    generation = engine.generate_tokens(PROMPT, SAMPLED)
    tokens = [next(generation) for _ in range(4)]
    snapshot = engine.snapshot()
    assert snapshot.token_ids == (*PROMPT, *tokens[:-1])
    assert [*tokens, *generation] == expected
    engine.restore(snapshot)
    again = engine.snapshot()
    assert (again.keys.tobytes(), again.values.tobytes()) == (snapshot.keys.tobytes(), snapshot.values.tobytes())
