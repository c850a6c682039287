"""scripts/serve_overhead.py: what the server adds to a token, on a tiny model; and the tokenizer of random weights."""

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'numba-atomflow[serve]'")

import serve_overhead

from numba_atomflow.text.codec import TextAssets, TextCodec


def test_times_of_engine_and_server_and_of_health(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--tokens", "4", "--rounds", "2", "--clients", "3", "--threads", "1", "--backend", "cpu"
    assert serve_overhead.main([str(tiny_checkpoint), *sizes, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    for kind in ("seconds", "cpu_seconds"):
        assert len(record[kind]["engine"]) == len(record[kind]["server"]) == 2
        assert min(record[kind]["engine"] + record[kind]["server"]) > 0
    assert record["health_ms"] == sorted(record["health_ms"])
    assert record["health_ms"]


def test_bad_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_overhead.main(["no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        serve_overhead.main(["--geometry", "no-such-geometry"])
    with pytest.raises(SystemExit, match="2"):
        serve_overhead.main(["a-model", "--geometry", "smollm2-135m"])
    assert "not allowed with" in capsys.readouterr().err


def test_every_token_of_random_weights_has_a_spelling() -> None:
    codec = TextCodec(TextAssets(tokenizer_json=serve_overhead.word_tokenizer(300)))
    assert codec.vocabulary_size == 300
    prompt = codec.encode(serve_overhead.PROMPT)
    assert max(prompt) < 256
    assert codec.decode(prompt) == serve_overhead.PROMPT
    assert codec.decode([256, 299]) == " word0 word43"
