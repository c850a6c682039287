"""Scores and log-probabilities compared with transformers on the same dequantized weights."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from reference import Reference
from tiny_models import tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.convert import convert

LIMIT = 1e-4  # nats per token


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)


def test_a_tiny_model(tmp_path: Path) -> None:
    geometry = tiny_geometry()
    write_hf_folder(tmp_path / "hf", geometry)
    tokens = np.random.default_rng(0).integers(0, geometry.vocabulary, 60).tolist()
    prompt, continuations = tokens[:40], [tokens[40:], tokens[40:43], [5], [*tokens[40:50], 7, 8]]
    with Engine.load(convert(tmp_path / "hf", tmp_path / "model.safetensors"), threads=1) as engine:
        reference = Reference(tmp_path / "hf", engine.checkpoint)
        scores = engine.score_many([(prompt, continuation) for continuation in continuations])
        for continuation, score in zip(continuations, scores, strict=True):
            rows = log_softmax(reference.logits(prompt + continuation)[len(prompt) - 1 : -1])
            expected = rows[np.arange(len(continuation)), continuation]
            assert score.logprobs == pytest.approx(expected, abs=LIMIT)
            assert score.is_greedy == (rows.argmax(axis=1).tolist() == continuation)
        reply = engine.generate_tokens(tokens, SamplingParams(max_tokens=8, logprobs=0, prompt_logprobs=5)).finish()
        rows = log_softmax(reference.logits(tokens + reply.token_ids[:-1]))
    entries = [*reply.prompt_logprobs[1:], *reply.logprobs]
    for row, token, entry in zip(rows, [*tokens[1:], *reply.token_ids], entries, strict=True):
        assert entry is not None
        assert entry.logprob == pytest.approx(row[token], abs=LIMIT)
        assert [logprob for _, logprob in entry.top] == pytest.approx(np.sort(row)[::-1][: len(entry.top)], abs=LIMIT)
