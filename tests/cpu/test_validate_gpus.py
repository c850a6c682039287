"""`validate --diff-gpus`: two backends of the same bits pass, and a wrong bit of one of them is found."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.errors import ContextError, OptionError
from numba_atomflow.validate import GpusReport, StepBits, compare_gpus, record_steps

GEOMETRY = tiny_geometry()
PROMPT = [5, 17, 200]
STEPS = 4
POSITIONS = len(PROMPT) + STEPS


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.random(GEOMETRY, "cpu", max_seq_len=POSITIONS) as opened:
        yield opened


@pytest.fixture
def one(engine: Engine) -> StepBits:
    return record_steps(engine.backend, GEOMETRY, PROMPT, STEPS)


def report(engine: Engine, one: StepBits) -> GpusReport:
    return compare_gpus(one, record_steps(engine.backend, GEOMETRY, PROMPT, STEPS))


def test_the_same_bits_pass(engine: Engine, one: StepBits) -> None:
    result = report(engine, one)
    assert result.passed
    assert result.verdict() == "PASS: keys, values, logits and tokens have the bits of one GPU at 7 positions."
    assert result.elements == POSITIONS * (GEOMETRY.vocabulary + 2 * GEOMETRY.layers * GEOMETRY.kv_dim + 2)
    assert result.to_dict()["passed"]
    assert one.parts["tokens"][len(PROMPT) - 1 :].tolist() == one.parts["reply"][len(PROMPT) - 1 :].tolist()
    engine.reset()
    np.testing.assert_array_equal(engine.feed(PROMPT), one.parts["logits"][len(PROMPT) - 1])


def _in_step(position: int, spoil: Callable[[Any], None]) -> Callable[[Any], None]:
    """After the step at this position, which all that follow read."""

    def install(backend: Any) -> None:
        run = backend.prefill

        def wrong(tokens: list[int], head: Any) -> None:
            before = int(backend._position[0])
            run(tokens, head)
            if before == position:
                spoil(backend)

        backend.prefill = wrong

    return install


def _value(backend: Any) -> None:
    backend._array("kv_cache")[1, 1, 4, -1] += 1  # of the last head


def _logit(backend: Any) -> None:
    logits = backend._array("logits")
    logits[0, -1] = np.nextafter(logits[0, -1], np.float32(np.inf))


def _queued_ahead(backend: Any) -> None:
    """Steps of a generation, not those after each of which the host waits, choose other tokens."""
    decode, sampled, steps = backend.decode, backend.sampled_tokens, 0

    def counted() -> None:
        nonlocal steps
        steps += 1
        decode()

    backend.decode, backend.sampled_tokens = counted, lambda: (sampled()[0] ^ (steps == 2),)


MUTANTS = {
    "value": (_in_step(4, _value), "layer.1.v", 4),
    "logit": (_in_step(2, _logit), "logits", 2),
    "queued": (_queued_ahead, "reply", len(PROMPT) + 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_bit_is_found(engine: Engine, one: StepBits, name: str) -> None:
    install, part, position = MUTANTS[name]
    install(engine.backend)
    result = report(engine, one)
    assert (result.part, result.position) == (part, position)
    assert result.verdict().startswith(f"FAIL: they differ from one GPU, first in {part} at position {position} (")
    assert result.to_dict()["passed"] is False


def test_what_cannot_be_run(engine: Engine) -> None:
    with pytest.raises(ContextError):
        record_steps(engine.backend, GEOMETRY, PROMPT, STEPS + 1)
    with pytest.raises(OptionError, match="empty"):
        record_steps(engine.backend, GEOMETRY, [], STEPS)
