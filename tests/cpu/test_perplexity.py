"""Perplexity against its definition, computed token by token."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow import Engine
from numba_atomflow.convert import convert
from numba_atomflow.errors import CheckpointError, OptionError, SourceError, TextError
from numba_atomflow.perf.perplexity import choose_windows, measure
from numba_atomflow.text.codec import TextCodec
from numba_atomflow.utils.json_text import json_text

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. Æther."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    write_hf_folder(folder / "hf", tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=600))
    return convert(folder / "hf", folder / "model.safetensors")


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, backend="cpu", threads=1) as engine:
        yield engine


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def losses(engine: Engine, tokens: Sequence[int], context: int, stride: int) -> list[float]:
    """-log p of each token but the first, from its own window, fed token by token."""
    found, stop = [], 0
    while stop < len(tokens):
        first, stop = max(1, stop), context if stop == 0 else stop + stride
        stop = min(stop, len(tokens))
        start = max(0, stop - context)
        engine.reset()
        for t in range(start, stop - 1):
            logits = engine.feed([tokens[t]])
            if t + 1 >= first:
                found.append(-float(log_probabilities(logits)[tokens[t + 1]]))
    return found


@pytest.mark.parametrize(("context", "stride"), [(600, 300), (40, 20), (16, 15), (17, 1), (2, 1)])
def test_every_token_is_scored_once_in_its_window(engine: Engine, context: int, stride: int) -> None:
    tokens = engine.text.encode(TEXT)
    expected = losses(engine, tokens, context, stride)
    assert len(expected) == len(tokens) - 1
    result = measure(engine, TEXT, context, stride)
    assert result.tokens == len(tokens) - 1
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    # The first token, a byte, is given.
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-4)
    assert (result.context, result.stride, result.divergence) == (context, stride, None)
    assert result.tokens_per_second > 0


def test_a_window_longer_than_a_block_of_rows(engine: Engine) -> None:
    text = TEXT * 5
    expected = losses(engine, engine.text.encode(text), 300, 200)
    assert measure(engine, text, 300, 200).perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)


def test_with_a_bos_the_first_token_is_scored_too(checkpoint: Path) -> None:
    with Engine.load(checkpoint, backend="cpu", threads=1) as engine:
        engine.text = TextCodec(replace(engine.checkpoint.text, add_bos=True))
        tokens = engine.text.encode(TEXT)
        assert tokens[0] == 0
        expected = losses(engine, tokens, 600, 300)
        result = measure(engine, TEXT, 600, 300)
    assert result.tokens == len(TEXT.encode())
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)


def test_a_reference_that_is_the_model_itself(engine: Engine, checkpoint: Path) -> None:
    with Engine.load(checkpoint, backend="cpu", threads=1) as other:

        def same(tokens: Sequence[int]) -> NDArray[np.float32]:
            other.reset()
            return other.feed(tokens, all_logits=True)

        divergence = measure(engine, TEXT, 40, 20, same).divergence
    assert divergence is not None
    assert divergence.top1 == 1
    assert divergence.mean_kl == pytest.approx(0, abs=1e-6)


def test_a_uniform_reference(engine: Engine) -> None:
    """Against equal probabilities: perplexity V, and the divergence of the definition."""

    def uniform(tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.zeros((len(tokens), SMALLEST_VOCABULARY), np.float32)

    tokens = engine.text.encode(TEXT)
    rows = [log_probabilities(row) for row in engine.feed(tokens, all_logits=True)[:-1]]
    expected = np.mean([(-np.log(SMALLEST_VOCABULARY) - row).mean() for row in rows])
    divergence = measure(engine, TEXT, 600, 300, uniform).divergence
    assert divergence is not None
    assert divergence.reference_perplexity == pytest.approx(SMALLEST_VOCABULARY, rel=1e-4)
    assert divergence.mean_kl == pytest.approx(expected, rel=1e-3)
    assert divergence.top1 == pytest.approx(np.mean([row.argmax() == 0 for row in rows]))


@pytest.mark.parametrize(
    ("context", "stride", "fragment"),
    [
        (1, None, "context is 1"),
        (601, None, "context is 601"),
        (10, 10, "stride is 10"),
        (10, 0, "stride is 0"),
        (10.0, None, "context is 10.0; it must be a whole number"),
        (10, "5", "stride is '5'; it must be a whole number"),
    ],
)
def test_invalid_windows_are_refused(context: Any, stride: Any, fragment: str) -> None:
    with pytest.raises(OptionError, match=fragment):
        choose_windows(600, context, stride)


def test_default_windows() -> None:
    assert choose_windows(8192, None, None) == (1024, 512)
    assert choose_windows(3, None, None) == (3, 1)
    assert choose_windows(8192, 2048, None) == (2048, 1024)
    with pytest.raises(OptionError, match="context is a single token"):
        choose_windows(1, None, None)


@pytest.mark.parametrize("text", ["", "a"])
def test_texts_that_are_too_short(engine: Engine, text: str) -> None:
    with pytest.raises(TextError, match="too short"):
        measure(engine, text)


# --- overflow and underflow ----------------------------------------------------------------------------------------


def fed_with(engine: Engine, monkeypatch: pytest.MonkeyPatch, row: Callable[[int], float]) -> None:
    """The engine's logits are `row` at the correct token, and 0 elsewhere."""

    def feed(tokens: Sequence[int], all_logits: bool = False) -> NDArray[np.float32]:
        logits = np.zeros((len(tokens), engine.geometry.vocabulary), np.float32)
        logits[:, engine.text.encode("a", add_special=False)[0]] = [row(i) for i in range(len(tokens))]
        return logits

    monkeypatch.setattr(engine, "feed", feed)


@pytest.mark.parametrize("worst", [-800.0, -3e38])
def test_a_loss_beyond_exp_is_an_infinite_perplexity(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, worst: float
) -> None:
    fed_with(engine, monkeypatch, lambda _: worst)
    found = measure(engine, "a" * 40, 32, 16)
    assert found.perplexity == math.inf
    assert found.bits_per_byte == pytest.approx(-worst / math.log(2) * 39 / 39, rel=0.03)
    assert json.loads(json_text(found.to_dict()))["perplexity"] is None


def test_logits_of_both_signs_at_the_end_of_float32(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fed_with(engine, monkeypatch, lambda i: 3e38 * (-1) ** i)

    def reference(tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.full((len(tokens), engine.geometry.vocabulary), -3e38, np.float32)

    found = measure(engine, "a" * 40, 32, 16, reference)
    assert found.perplexity == math.inf
    assert found.divergence is not None
    assert math.isfinite(found.divergence.mean_kl)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_are_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    def reference(tokens: Sequence[int]) -> NDArray[np.float32]:
        return np.full((len(tokens), engine.geometry.vocabulary), wrong, np.float32)

    with pytest.raises(SourceError, match="reference's logits contain NaN or Inf"):
        measure(engine, "a" * 40, 32, 16, reference)
    fed_with(engine, monkeypatch, lambda i: wrong if i == 3 else 0.0)
    with pytest.raises(CheckpointError, match="Logits contain NaN or Inf"):
        measure(engine, "a" * 40, 32, 16)
