"""The backend of several GPUs in numba's simulator, under observers: whole steps, the validator, and a fault."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
from numpy.typing import NDArray
from simulated_ranks import simulate_ranks
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

from numba_atomflow import Engine, validate
from numba_atomflow.backends.base import Backend, Memory
from numba_atomflow.model.step import SAMPLE, Attention, LmHead, Op

pytestmark = pytest.mark.slow  # tests/cpu/test_tensor_parallel_backend.py has what needs no kernels
SMALL = tiny_geometry(layers=1, hidden=32, heads=2, kv_heads=2, head_dim=64, ffn=32, vocabulary=40)
TOKEN = 33  # of the second rank's part of the vocabulary


@pytest.fixture
def engine(
    monkeypatch: pytest.MonkeyPatch,
    all_blocks_at_once: None,
    side_by_side: Callable[..., AbstractContextManager[None]],
) -> Iterator[Engine]:
    """On two GPUs."""
    simulate_ranks(monkeypatch, side_by_side, 2)
    with Engine.random(SMALL, "cuda", 8, gpus=2) as opened:
        yield opened


class ReadsAndWrites:
    """An observer that reads every view of every op, and puts back what it has read."""

    logits: NDArray[np.float32]

    def before(self, op: Op, memory: Memory) -> None:
        for view in op.reads:
            memory.write(view, memory.read(view))

    def after(self, op: Op, memory: Memory) -> None:
        for view in op.writes:
            memory.write(view, memory.read(view))
        if isinstance(op, LmHead):
            self.logits = memory.read(op.logits)


def keys_and_values(backend: Backend) -> list[NDArray[np.uint16]]:
    """Of the first position."""
    (op,) = (op for op in backend.step(1, SAMPLE) if isinstance(op, Attention))
    with backend.memory() as memory:
        return [memory.read(view.rows(0, 1)).view(np.uint16) for view in (op.keys, op.values)]


def test_an_observed_step_has_the_bits_of_a_whole_one(engine: Engine) -> None:
    backend, observer = engine.backend, ReadsAndWrites()
    logits = engine.feed([TOKEN])
    expected = keys_and_values(backend)
    backend.seek(0)
    backend.observe([TOKEN], SAMPLE, observer)
    assert logits.any()
    np.testing.assert_array_equal(observer.logits[0], logits)
    np.testing.assert_array_equal(keys_and_values(backend), expected)
    assert backend.sampled_tokens() == (int(logits.argmax()),)
    np.testing.assert_array_equal(backend.logits(0, 1, ReadsAndWrites())[0], logits)


def test_the_validator_finds_a_fault_of_one_rank(engine: Engine) -> None:
    with Engine.random(SMALL, "cpu", 8) as one:
        reference = validate.record(one.backend, SMALL, [TOKEN], 0)
    assert validate.check(engine.backend, reference).passed
    rank = engine.backend._ranks[1]  # type: ignore[attr-defined]
    with rank.owner.current():
        words = rank.weight_views["layer.0.o"]
        rank.memory.write(words, rank.memory.read(words) ^ np.uint32(0x80))  # other signs of some weights
    report = validate.check(engine.backend, reference)
    assert report.fault is not None
    assert (report.fault.op, report.fault.probe) == ("layer.0.o", "layer.0.after_attention")
