"""Gemma 3 270M compared with transformers: logits, greedy tokens, tokens of texts, and every probe.

Skipped unless the packages that hold its weights are installed.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference, check_logits
from text_samples import SAMPLES

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.convert import convert

pytestmark = pytest.mark.slow

TEXTS = {
    "prose": (
        "The lighthouse keeper climbed the stairs every evening at dusk, carrying oil for the lamp and a book that he"
    ),
    "code": (
        "```python\ndef binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n"
        "        middle = (low + high) // 2\n"
    ),
    "chat": "<start_of_turn>user\nName three rivers of Europe.<end_of_turn>\n<start_of_turn>model\n",
}
WINDOW = 512
MOST_SPACES = 31  # in one token


@pytest.fixture(scope="module")
def engine(gemma3_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    checkpoint = convert(gemma3_gguf, tmp_path_factory.mktemp("gemma3") / "gemma3.safetensors")
    with Engine.load(checkpoint, "cpu", max_seq_len=WINDOW + 256) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(gemma3_gguf: Path, engine: Engine) -> Reference:
    return Reference(gemma3_gguf, engine.checkpoint)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> dict[str, list[int]]:
    """Tokens by name; "long" is longer than the sliding window."""
    tokens = {name: engine.text.encode(text) for name, text in TEXTS.items()}
    words = engine.text.encode(" ".join(sample for sample in SAMPLES if "<" not in sample))
    return tokens | {"long": words[: WINDOW + 128]}


def test_the_geometry_is_that_of_the_family(engine: Engine) -> None:
    geometry = engine.geometry
    assert (geometry.layers, geometry.hidden, geometry.head_dim, geometry.vocabulary) == (18, 640, 256, 262144)
    assert (geometry.sliding_window, geometry.rope_theta, geometry.local_rope_theta) == (WINDOW, 1e6, 1e4)
    assert set(range(18)) - set(geometry.sliding_layers) == {5, 11, 17}


@pytest.mark.parametrize("name", [*TEXTS, "long"])
def test_logits_and_32_greedy_tokens(
    engine: Engine, reference: Reference, prompts: dict[str, list[int]], name: str
) -> None:
    tokens = prompts[name]
    expected = reference.logits(tokens)
    engine.reset()
    check_logits(engine.feed(tokens, all_logits=True), expected, "one block")
    if name in TEXTS:
        engine.reset()
        check_logits(np.stack([engine.feed([token]) for token in tokens]), expected, "token by token")
    engine.reset()
    reply = engine.generate(tokens, SamplingParams(max_tokens=32, ignore_eos=True)).finish()
    assert reply.token_ids == reference.greedy(tokens, 32)


def test_tokens_of_texts(engine: Engine, gemma3_gguf: Path) -> None:
    """transformers' reader looks for runs of spaces before they are ▁: where one is longer than any token, its own
    tokens are not those of the model's tokenizer.json, which ours are.
    """
    transformers: Any = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its dependencies
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(gemma3_gguf.parent), gguf_file=gemma3_gguf.name)
    longer = [text for text in SAMPLES if " " * (MOST_SPACES + 1) in text]
    different = [text for text in SAMPLES if engine.text.encode(text) != tokenizer(text)["input_ids"]]
    assert len(SAMPLES) >= 250
    assert different == longer
    for text in SAMPLES:
        ids = engine.text.encode(text)
        assert engine.text.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    model = json.loads(engine.text.assets.tokenizer_json)["model"]["vocab"]
    spaces = engine.text.encode("a" + " " * (3 * MOST_SPACES + 7) + "b")  # as the tokenizer.json of Gemma 3
    assert spaces == [2, model["a"], 167, 167, 167, 143, model["b"]]


def test_every_probe(engine: Engine, prompts: dict[str, list[int]]) -> None:
    pytest.importorskip("transformers")
    from numba_atomflow.validate import check, make_ground_truth

    truth = make_ground_truth(engine.checkpoint, prompts["prose"], 8)
    for isolate in (False, True):
        report = check(engine.backend, truth, isolate=isolate)
        assert report.verdict() == "PASS: 27/27 probes, 139/139 inner stages."
