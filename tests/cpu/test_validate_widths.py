"""`validate --widths`: passes on this backend, and finds an error of one bit in one column."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Verification
from numba_atomflow.errors import BackendError, ContextError, OptionError
from numba_atomflow.validate import WidthsReport, check_widths
from numba_atomflow.validate.widths import POSITIONS

GEOMETRY = tiny_geometry()
PROMPT = [5, 17, 200, 3, 44]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine.random(GEOMETRY, "cpu", max_seq_len=len(PROMPT) + POSITIONS) as opened:
        yield opened


def report(engine: Engine, *widths: int) -> WidthsReport:
    return check_widths(engine.backend, GEOMETRY, PROMPT, widths)


def test_all_widths_pass(engine: Engine) -> None:
    seen: list[str] = []
    result = check_widths(engine.backend, GEOMETRY, PROMPT, progress=lambda what, *_: seen.append(what))
    assert result.passed
    assert result.verdict() == "PASS: steps of 1, 2, 4, 8 tokens have the bits of decode steps at 64 positions."
    elements = POSITIONS * (GEOMETRY.vocabulary + 2 * GEOMETRY.layers * GEOMETRY.kv_dim)
    assert [(part.width, part.elements) for part in result.widths] == [(w, elements) for w in (1, 2, 4, 8)]
    assert seen == ["decode steps", "steps of 1", "steps of 2", "steps of 4", "steps of 8", "done"]
    record = result.to_dict()
    assert record["passed"]
    assert record["widths"][0] == {
        "width": 1,
        "elements": elements,
        "different": 0,
        "position": None,
        "part": None,
        "passed": True,
    }


def next_float(values: NDArray[np.float32]) -> None:
    """Another last bit in the first element."""
    values[0] = np.nextafter(values[0], np.float32(np.inf))


Mutant = Callable[[Any], None]


def _logits(backend: Any) -> None:
    """The last bit of a logit of the third column."""
    verify = backend.verify

    def wrong(tokens: list[int]) -> Any:
        logits = verify(tokens)
        if len(tokens) > 2:
            next_float(logits[2])
        return logits

    backend.verify = wrong


def _after_op(name: str, array: str, column: int) -> Mutant:
    """The last bit of what an op has written for one column."""

    def install(backend: Any) -> None:
        bound = backend.bound_step

        def wrong(tokens: int, head: Any) -> Any:
            actions = list(bound(tokens, head))
            if tokens > column:
                index = [op.name for op in backend.step(tokens, head)].index(name)
                action = actions[index]

                def spoil() -> None:
                    action()
                    next_float(backend._array(array)[column])

                actions[index] = spoil
            return actions

        backend.bound_step = wrong

    return install


def _forgotten_keys(backend: Any) -> None:
    """Keys of the second column that no step writes."""
    verify = backend.verify

    def wrong(tokens: list[int]) -> Any:
        position = int(backend._position[0])
        keys = backend._array("kv_cache")[1, 0]
        if len(tokens) < 2:
            return verify(tokens)
        before = keys[position + 1].copy()
        logits = verify(tokens)
        keys[position + 1] = before
        return logits

    backend.verify = wrong


FIRST = len(PROMPT)
MUTANTS = {
    "logits": (_logits, "logits", FIRST + 2),
    "attention": (_after_op("layer.0.attention", "attn_out", 1), "layer.1.k", FIRST + 1),
    "gate_up": (_after_op("layer.0.gate_up", "intermediate", 3), "layer.1.k", FIRST + 3),
    "down": (_after_op("layer.1.down", "residual", 2), "logits", FIRST + 2),
    "keys": (_forgotten_keys, "layer.1.k", FIRST + 1),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_bit_in_one_column_is_found(engine: Engine, name: str) -> None:
    install, part, position = MUTANTS[name]
    install(engine.backend)
    result = report(engine, 1, 4)
    narrow, wide = result.widths
    assert narrow.passed, "the mutant spoils decode steps as well"
    assert not wide.passed
    assert (wide.part, wide.position) == (part, position)
    assert not result.passed
    assert result.verdict().startswith(
        f"FAIL: steps of 4 tokens differ from decode steps, first in {part} at position {position} ({wide.different} of"
    )
    assert result.to_dict()["widths"][1]["passed"] is False


def test_what_cannot_be_checked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="Steps of 9 tokens cannot be checked on cpu, because it verifies at most 8"):
        report(engine, 2, 9)
    for widths in ((), (0,), (2, -1)):
        with pytest.raises(OptionError, match="--widths takes numbers"):
            report(engine, *widths)
    with pytest.raises(ContextError):
        check_widths(engine.backend, GEOMETRY, [1] * (FIRST + 1))
    with pytest.raises(OptionError, match="empty"):
        check_widths(engine.backend, GEOMETRY, [])
    monkeypatch.setattr(type(engine.backend), "verification", Verification(1, "its kernels differ"))
    with pytest.raises(BackendError, match="because its kernels differ"):
        report(engine, 2)
    assert report(engine, 1).passed
