"""The examples of docs/research.md, run as they stand there, on the demo model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository_files import ROOT

from numba_atomflow import Engine

DOCUMENT = (ROOT / "docs" / "research.md").read_text()
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^### (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
EXAMPLES = {heading: CODE.findall(text) for heading, text in SECTION.findall(DOCUMENT)}


@pytest.fixture(scope="module")
def beginning(smollm2_checkpoint: Path) -> Iterator[dict[str, Any]]:
    """The names that every example has."""
    (code,) = CODE.findall(DOCUMENT.partition("## Cookbook")[2].partition("\n### ")[0])
    assert code.count('Engine.load("smollm2-135m-instruct")') == 1
    names: dict[str, Any] = {}
    exec(code.replace('"smollm2-135m-instruct"', f"{str(smollm2_checkpoint)!r}, 'cpu', 512"), names)
    with names["engine"]:
        yield names


@pytest.fixture
def names(beginning: dict[str, Any]) -> dict[str, Any]:
    """The same for one example."""
    beginning["engine"].reset()
    return dict(beginning)


def run(names: dict[str, Any], *headings: str) -> None:
    """Run examples, one after the other."""
    for heading in headings:
        for code in EXAMPLES[heading]:
            exec(code, names)


def test_every_example_is_run() -> None:
    source = Path(__file__).read_text()
    assert len(EXAMPLES) >= 8
    assert [heading for heading in EXAMPLES if f'"{heading}"' not in source] == []


def test_the_introduction(smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = CODE.findall(DOCUMENT.partition("\n## ")[0])
    names: dict[str, Any] = {}
    exec(code.replace('"smollm2-135m-instruct"', repr(str(smollm2_checkpoint))), names)
    with names["engine"] as engine:
        assert names["captured"]["layer.29.output"].shape == (5, 576)
        plain = engine.generate("The capital of France is", names["SamplingParams"](max_tokens=8)).finish().text
        assert capsys.readouterr().out.strip() not in ("", plain.strip())


def test_logit_lens(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(names, "Logit lens")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 31
    assert lines[-1].startswith("30 [' Paris', ")
    assert lines[-2].startswith("29 [' the', ")
    assert not any("' Paris'" in line for line in lines[:25])


def test_attention_weights(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(names, "Attention weights")
    assert names["weights"].shape == (9, len(names["prompt"]), len(names["prompt"]))
    assert len(re.findall(r"^head \d: \d+% on '", capsys.readouterr().out, re.MULTILINE)) == 9


def test_activation_patching(names: dict[str, Any]) -> None:
    run(names, "Activation patching")
    margins = names["margins"]
    assert all((margins[3, layer] < 0) == (layer <= 18) for layer in range(0, 30, 6))
    assert all((margins[4, layer] < 0) == (layer >= 24) for layer in range(0, 30, 6))


@pytest.mark.slow
def test_steering_vector(names: dict[str, Any]) -> None:
    run(names, "Steering vector")
    engine: Engine = names["engine"]
    plain = engine.generate("I went to see the film, and", names["SamplingParams"](max_tokens=16)).finish().text
    assert names["texts"][0] == plain
    assert len(set(names["texts"].values())) == 3


@pytest.mark.slow
def test_quantisation_error_by_layer(
    names: dict[str, Any], smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(smollm2_gguf.parent)
    run(names, "Quantisation error by layer")
    assert len(names["errors"]) == 30
    assert 0.001 < min(names["errors"]) <= max(names["errors"]) < 0.1


def test_kv_surgery(names: dict[str, Any]) -> None:
    names |= {
        name: names["engine"].text.encode(f"The capital of {country} is")
        for name, country in (("france", "France"), ("italy", "Italy"))
    }
    run(names, "KV surgery")
    assert names["answer"] == " Rome"
    logits = names["engine"].feed(names["france"])
    assert names["engine"].text.decode([int(logits.argmax())]) == " Paris"


def test_custom_sampler(names: dict[str, Any]) -> None:
    run(names, "Custom sampler")
    engine: Engine = names["engine"]
    assert engine.token_ids == [*engine.text.encode("Once upon a time"), *names["chosen"]]
    assert len(names["chosen"]) == 24
    assert names["kept"].size < 1000


@pytest.mark.slow
def test_custom_constraint(names: dict[str, Any]) -> None:
    run(names, "Custom constraint")
    assert len(names["reply"].text) > 40
    assert "e" not in names["reply"].text.lower()


@pytest.mark.slow
def test_a_drafter_of_one_s_own(smollm2_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "speculation.md").read_text().partition("## A drafter of your own")[2]
    assert "#a-drafter-of-your-own" in DOCUMENT
    exec(CODE.findall(text)[0].replace('"smollm2-135m-instruct"', repr(str(smollm2_checkpoint))), {})
    steps = re.findall(r"^(\d+) (\d+) [\d.e-]+$", capsys.readouterr().out, re.MULTILINE)
    assert sum(int(accepted) for _, accepted in steps) > 0


def test_time_per_layer(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(names, "Time per layer")
    assert len(re.findall(r"^\w+: \d+ us a layer, [\d.]+ ms a token$", capsys.readouterr().out, re.MULTILINE)) == 5
    assert np.all(np.array(list(names["seconds"].values())) > 0)
