"""An engine and threads: alternating and concurrent calls, and use after close."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import random_weights, tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.convert import convert
from numba_atomflow.errors import AtomFlowError, ClosedError, EngineBusyError
from numba_atomflow.model.step import NO_LOGITS

PROMPT = [1, 2, 3]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.random(tiny_geometry(), "cpu", max_seq_len=64, threads=1) as engine:
        yield engine


def in_thread(action: Callable[[], object]) -> Any:
    """Run an action in another thread; returns its result or error."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(action())
        except AtomFlowError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def ids(engine: Engine, prompt: list[int], count: int = 6) -> list[int]:
    return engine.generate_tokens(prompt, SamplingParams(max_tokens=count)).finish().token_ids


@pytest.fixture
def in_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """Starts a generation in another thread, blocked during a decode step; yields a function that unblocks it,
    waits for the thread and returns the tokens."""
    entered, go_on = threading.Event(), threading.Event()
    verify, found = engine.backend.verify, []

    def slow(tokens: Sequence[int]) -> object:
        entered.set()
        go_on.wait()
        return verify(tokens)

    monkeypatch.setattr(engine.backend, "verify", slow)
    thread = threading.Thread(target=lambda: found.append(ids(engine, PROMPT)))
    thread.start()
    entered.wait()

    def finish() -> object:
        go_on.set()
        thread.join()
        return found[0]

    yield finish
    finish()


USES: dict[str, Callable[[Engine], object]] = {
    "feed": lambda engine: engine.feed([1]),
    "rewind": lambda engine: engine.rewind(0),
    "reset": lambda engine: engine.reset(),
    "generate_tokens": lambda engine: engine.generate_tokens(PROMPT),
}


@pytest.mark.parametrize("use", USES)
def test_a_call_during_another_threads_step_is_refused_without_effect(
    engine: Engine, in_a_step: Callable[[], object], use: str
) -> None:
    with pytest.raises(EngineBusyError, match="one thread at a time"):
        USES[use](engine)
    tokens = in_a_step()
    assert tokens == ids(engine, PROMPT)


@pytest.mark.parametrize("use", USES)
def test_a_call_between_another_threads_tokens_is_refused_without_effect(engine: Engine, use: str) -> None:
    alone = ids(engine, PROMPT)
    reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=6))
    next(reply)
    assert isinstance(in_thread(lambda: USES[use](engine)), EngineBusyError)
    assert reply.finish().token_ids == alone
    assert reply.finish_reason == "max_tokens"


def test_threads_may_take_turns(engine: Engine) -> None:
    alone = ids(engine, PROMPT)
    assert in_thread(lambda: ids(engine, PROMPT)) == alone
    reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=6))
    next(reply)
    for _ in range(2):  # as a web server does, whose next thread goes on with the reply
        in_thread(lambda: next(reply))
    assert reply.finish().token_ids == alone


@pytest.mark.parametrize("how", ["closed", "forgotten", "its thread has ended"])
def test_an_abandoned_generation_does_not_block_others(engine: Engine, how: str) -> None:
    def begin() -> Any:
        reply = engine.generate_tokens(PROMPT)
        next(reply)
        return reply

    gc.disable()  # a reply must not wait for it
    try:
        if how == "closed":
            reply = begin()
            reply.close()
        elif how == "forgotten":
            begin()
        else:
            reply = in_thread(begin)
        if how == "its thread has ended":
            ids(engine, PROMPT)
            assert reply.finish_reason == "interrupted"
        else:
            assert isinstance(in_thread(lambda: ids(engine, PROMPT)), list)
    finally:
        gc.enable()


def test_two_generations_in_one_thread_interrupt_each_other(engine: Engine) -> None:
    first = engine.generate_tokens(PROMPT)
    next(first)
    second = engine.generate_tokens(PROMPT)
    assert first.finish_reason == "interrupted"
    assert list(first) == []
    next(second)


def test_a_signal_handler_during_a_step_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def handler(*_: object) -> None:
        for use in (*USES.values(), lambda engine: engine.close()):
            try:
                seen.append(use(engine))
            except AtomFlowError as error:
                seen.append(type(error))

    previous = signal.signal(signal.SIGUSR1, handler)
    verify = engine.backend.verify

    def interrupted(tokens: Sequence[int]) -> object:
        os.kill(os.getpid(), signal.SIGUSR1)
        return verify(tokens)

    monkeypatch.setattr(engine.backend, "verify", interrupted)
    try:
        assert len(ids(engine, PROMPT, 2)) == 2
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert seen == [EngineBusyError] * 5


def test_the_engine_is_usable_after_ctrl_c_in_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ids(engine, PROMPT)

    def interrupt(_: Sequence[int]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.backend, "verify", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ids(engine, PROMPT)
    assert in_thread(lambda: ids(engine, PROMPT)) == alone


def test_closing_waits_for_another_threads_step(engine: Engine, in_a_step: Callable[[], object]) -> None:
    closing = threading.Thread(target=engine.close)
    closing.start()
    engine.backend.sampled_tokens()  # still there
    tokens = in_a_step()
    closing.join()
    assert 1 <= len(tokens) <= 6  # type: ignore[arg-type]
    with pytest.raises(ClosedError):
        engine.feed([1])


# --- after close -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["backend", "position", "token_ids", "weight_bytes_per_token"])
def test_attributes_of_a_closed_engine_raise(attribute: str) -> None:
    engine = Engine.random(tiny_geometry(), "cpu", max_seq_len=8, threads=1)
    logits, backend = engine.feed([1]), engine.backend
    kept = logits.copy()
    reply = engine.generate_tokens(PROMPT)
    next(reply)
    engine.close()
    engine.close()
    with pytest.raises(ClosedError, match="The engine of random was closed; load it again"):
        getattr(engine, attribute)
    for use in USES.values():
        with pytest.raises(ClosedError):
            use(engine)
    assert reply.finish_reason == "interrupted"
    assert list(reply) == []
    np.testing.assert_array_equal(logits, kept)
    for call in (backend.decode, backend.sampled_tokens, lambda: backend.step(1, NO_LOGITS), lambda: backend.seek(0)):
        with pytest.raises(ClosedError, match="The backend was closed"):
            call()  # type: ignore[operator]
    backend.close()


def test_a_closed_checkpoint_keeps_only_existing_arrays(tmp_path: Path) -> None:
    geometry = tiny_geometry()
    write_hf_folder(tmp_path / "hf", geometry, weights=random_weights(geometry))
    with Checkpoint.open(convert(tmp_path / "hf", tmp_path / "model.safetensors")) as checkpoint:
        norm = checkpoint.array("final_norm")
        kept = norm.copy()
    checkpoint.close()
    with pytest.raises(ClosedError, match="was closed before"):
        checkpoint.array("final_norm")
    with pytest.raises(ClosedError, match="was closed before"):
        checkpoint.verify()
    np.testing.assert_array_equal(norm, kept)
