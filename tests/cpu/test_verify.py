"""A step that verifies proposed tokens: each column has the bits of the step of one token, logits and KV cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import tiny_geometry, write_hf_folder

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.model.step import NO_LOGITS, Attention
from numba_atomflow.sampling import Sampler, SamplingParams

GEOMETRIES = {
    "gqa": tiny_geometry(max_positions=720),
    "odd sizes": tiny_geometry(
        hidden=136, heads=3, kv_heads=1, head_dim=80, ffn=129, vocabulary=259, max_positions=720
    ),
    "bias": tiny_geometry(heads=2, kv_heads=2, qkv_bias=True, tied_embeddings=True, max_positions=720),
    "q and k norms": tiny_geometry(heads=6, kv_heads=3, head_dim=96, qk_norm=True, max_positions=720),
    "float16 head": tiny_geometry(layers=1, max_positions=720),
    "float16 embedding": tiny_geometry(layers=1, hidden=136, tied_embeddings=True, vocabulary=291, max_positions=720),
    "wide": tiny_geometry(layers=1, hidden=1280, heads=8, kv_heads=2, head_dim=128, ffn=2100, max_positions=720),
}
CONTEXTS = (1, 100, 700)
WIDTH = 8


@pytest.fixture(params=GEOMETRIES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    geometry, path = GEOMETRIES[request.param], tmp_path / "model.safetensors"
    if request.param.startswith("float16"):
        write_hf_folder(tmp_path / "hf", geometry)
        convert(tmp_path / "hf", path, head="fp16")
        opened = Engine.load(path, "cpu", max_seq_len=720)
    else:
        opened = Engine.random(geometry, "cpu", max_seq_len=720)
    with opened:
        yield opened


def some_tokens(engine: Engine, count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, engine.geometry.vocabulary, count).tolist()


def cache_rows(backend: Any, start: int, stop: int) -> NDArray[np.float32]:
    """Keys and values of all layers at positions start .. stop - 1."""
    ops = [op for op in backend.step(1, NO_LOGITS) if isinstance(op, Attention)]
    return np.stack([view.host_array()[start:stop] for op in ops for view in (op.keys, op.values)])


def decode_steps(engine: Engine, position: int, tokens: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and KV cache of these tokens, taken one by one, as `decode` takes them."""
    backend: Any = engine.backend
    backend.start(Sampler(SamplingParams(), engine.geometry.vocabulary, ()))
    backend.seek(position)
    logits = []
    for token in tokens:
        backend._tokens[0] = token
        backend.decode()
        logits.append(backend._logits[0].copy())
    return np.stack(logits), cache_rows(backend, position, position + len(tokens))


@pytest.mark.parametrize("position", CONTEXTS)
def test_every_width_has_the_bits_of_decode_steps(engine: Engine, position: int) -> None:
    tokens = some_tokens(engine, position + WIDTH)
    engine.feed(tokens[:position])
    proposed = tokens[position:]
    logits, cache = decode_steps(engine, position, proposed)
    for width in range(1, WIDTH + 1):
        engine.backend.seek(position)
        np.testing.assert_array_equal(engine.backend.verify(proposed[:width]), logits[:width])
        np.testing.assert_array_equal(cache_rows(engine.backend, position, position + width), cache[:, :width])


def test_the_most_likely_tokens_are_accepted(engine: Engine) -> None:
    backend, tokens = engine.backend, some_tokens(engine, 12)
    engine.feed(tokens)
    likely = tokens[:1]
    for position in range(12, 17):
        backend.seek(position)
        likely += backend.verify_greedy(likely[-1:])
    backend.seek(12)
    assert backend.verify_greedy(likely[:-1]) == likely[1:]
    likely[3] = (likely[3] + 1) % engine.geometry.vocabulary  # rejected, and what follows it is not looked at
    assert backend.verify_greedy(likely[:-1])[:2] == likely[1:3]
    assert len(backend.verify_greedy(likely[:-1])) == 3


def test_the_position_stays(engine: Engine) -> None:
    """The same tokens twice give the same logits; after a seek, a step continues behind what was accepted."""
    backend, tokens = engine.backend, some_tokens(engine, 20)
    engine.feed(tokens[:12])
    first = backend.verify(tokens[12:16]).copy()
    np.testing.assert_array_equal(backend.verify(tokens[12:16]), first)
    backend.seek(14)
    np.testing.assert_array_equal(backend.verify(tokens[14:16]), first[2:])


def test_what_was_rejected_leaves_no_trace(engine: Engine) -> None:
    tokens = some_tokens(engine, 20)
    engine.feed(tokens[:10])
    engine.backend.verify([tokens[10], *tokens[:7]])
    engine.backend.seek(11)
    after = engine.backend.verify(tokens[11:13]).copy()
    engine.rewind(10)
    np.testing.assert_array_equal(decode_steps(engine, 10, tokens[10:13])[0][1:], after)


def test_too_many_tokens_or_too_little_room() -> None:
    with Engine.random(tiny_geometry(layers=1), "cpu", max_seq_len=12) as engine:
        backend = engine.backend
        assert backend.verification.width == WIDTH
        assert backend.verification.reason == ""
        with pytest.raises(IndexError, match="verifies"):
            backend.verify([1] * (WIDTH + 1))
        backend.seek(10)
        with pytest.raises(IndexError, match="positions"):
            backend.verify([1, 2, 3])
