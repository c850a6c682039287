"""The backend of several GPUs in numba's simulator: steps of one token and of several, and under observers, with the
validator and a fault.
"""

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
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Attention, LmHead, Op
from numba_atomflow.sampling import Sampler, SamplingParams

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


def keys_and_values(backend: Backend, positions: int = 1) -> list[NDArray[np.uint16]]:
    """Of the first position, or of more."""
    (op,) = (op for op in backend.step(1, SAMPLE) if isinstance(op, Attention))
    with backend.memory() as memory:
        return [memory.read(view.rows(0, positions)).view(np.uint16) for view in (op.keys, op.values)]


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


def test_steps_of_several_tokens_have_the_bits_of_single_ones(engine: Engine) -> None:
    """Verified, and as a prompt: padded from 3 to 4, the padding behind the position."""
    backend, tokens = engine.backend, [TOKEN, 2, 39]
    expected = np.stack([engine.feed([token]) for token in tokens])
    cache, chosen = keys_and_values(backend, 3), expected.argmax(axis=1).tolist()
    blank = [np.full_like(rows, 0x7E00) for rows in cache]

    def forget() -> None:
        """Keys and values become NaN."""
        (op,) = (op for op in backend.step(1, SAMPLE) if isinstance(op, Attention))
        with backend.memory() as memory:
            for view, rows in zip((op.keys, op.values), blank, strict=True):
                memory.write(view.rows(0, 3), rows.view(np.float16))
        backend.seek(0)

    forget()
    np.testing.assert_array_equal(backend.verify(tokens), expected)
    np.testing.assert_array_equal(keys_and_values(backend, 3), cache)
    np.testing.assert_array_equal(backend.verify(tokens[:1]), expected[:1])
    assert backend.verify_greedy(tokens[:1]) == chosen[:1]
    assert backend.verify_greedy([tokens[0], chosen[0]])[0] == chosen[0]

    params = SamplingParams(temperature=1.0, seed=3)
    backend.start(Sampler(params, SMALL.vocabulary, ()))
    backend.prefill(tokens[:1], SAMPLE)
    sampled = list(backend.sampled_tokens())
    backend.decode()
    sampled += backend.sampled_tokens()
    backend.seek(0)
    backend.start(Sampler(params, SMALL.vocabulary, ()))
    assert backend.launch_verification([tokens[0], sampled[0]], sampled=True)() == sampled
    backend.start(Sampler(SamplingParams(), SMALL.vocabulary, ()))

    forget()
    backend.prefill(tokens, NO_LOGITS)
    np.testing.assert_array_equal(backend.logits(0, 3), expected)
    np.testing.assert_array_equal(keys_and_values(backend, 3), cache)

    forget()
    backend.prefill(tokens, SAMPLE)
    assert backend.sampled_tokens() == (chosen[2],)
    backend.decode()
    following = backend.sampled_tokens()
    backend.seek(3)
    backend.prefill([chosen[2]], SAMPLE)
    assert backend.sampled_tokens() == following, "the position moved by the tokens, without the padding"
