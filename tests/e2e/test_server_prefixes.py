"""Several conversations on one KV cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from numba_atomflow import Engine, SamplingParams

pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'numba-atomflow[serve]'")

from live_server import live_server

from numba_atomflow.server.prefixes import LEAST_TOKENS, Prefixes, common_length
from numba_atomflow.state.snapshot import bytes_per_token

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
LENGTH = 2 * LEAST_TOKENS


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, backend="cpu", threads=1) as engine:
        yield engine


def conversation(letter: int, length: int = LENGTH) -> list[int]:
    return [letter] * length


def reply(engine: Engine, prefixes: Prefixes, prompt: list[int]) -> tuple[int, list[int]]:
    """Tokens of the prompt that were known, and the reply."""
    known = prefixes.prepare(prompt)
    generation = engine.generate(prompt, PARAMS).finish()
    assert generation.stats.reused_tokens == known
    return known, generation.token_ids


def test_a_conversation_goes_on_where_it_was_after_others(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30)
    first = conversation(5)
    _, answer = reply(engine, prefixes, first)
    for letter in (6, 7, 8):
        assert reply(engine, prefixes, conversation(letter))[0] == 0
    again = [*first, *answer, 9]
    known, continued = reply(engine, prefixes, again)
    assert known == len(again) - 2  # all but the last token of the reply, which was not fed, and the new one
    engine.reset()
    assert engine.generate(again, PARAMS).finish().token_ids == continued
    assert len(prefixes) == 4


def test_a_longer_snapshot_replaces_those_of_its_beginnings(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30)
    prompt = conversation(5)
    for _ in range(3):
        _, answer = reply(engine, prefixes, prompt)
        reply(engine, prefixes, conversation(6))
        prompt = [*prompt, *answer, 9]
    assert len(prefixes) == 2  # of each conversation one


def test_the_least_recently_used_snapshot_is_dropped_and_the_bound_is_kept(engine: Engine) -> None:
    most = bytes_per_token(engine.backend) * (LENGTH + 6) * 2
    prefixes = Prefixes(engine, most)
    for letter in (5, 6, 5, 7, 8):  # kept: 6 and 5, and then 5 and 7
        reply(engine, prefixes, conversation(letter))
        assert prefixes.nbytes <= most
    assert reply(engine, prefixes, conversation(6))[0] == 0
    assert reply(engine, prefixes, conversation(7))[0] == LENGTH - 1


@pytest.mark.parametrize("most", [0, 100])
def test_without_room_nothing_is_kept(engine: Engine, most: int) -> None:
    prefixes = Prefixes(engine, most)
    for letter in (5, 6, 5):
        assert reply(engine, prefixes, conversation(letter))[0] == 0
    assert (len(prefixes), prefixes.nbytes) == (0, 0)


def test_short_ones_are_not_worth_a_copy(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30)
    for letter in (5, 6, 5):
        reply(engine, prefixes, conversation(letter, 8))
    assert len(prefixes) == 0


def test_the_common_length() -> None:
    assert [common_length([1, 2, 3], other) for other in ([], [1], [1, 2, 4], [1, 2, 3, 4])] == [0, 1, 2, 3]


def test_the_server_keeps_conversations(engine: Engine) -> None:
    def body(letter: int) -> dict[str, object]:
        return {"prompt": conversation(letter), "max_tokens": 2, "temperature": 0, "ignore_eos": True}

    with live_server(engine) as live:
        replies = [live.post("/v1/completions", body(letter)).body for letter in (5, 6, 7, 5)]
        cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in replies]
        assert cached == [0, 0, 0, LENGTH - 1]
        assert replies[3]["choices"] == replies[0]["choices"]
        assert live.metric("atomflow_prefix_cache_entries") == 3
        assert live.metric("atomflow_prefix_cache_bytes") > 0
