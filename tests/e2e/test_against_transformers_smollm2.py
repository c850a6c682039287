"""SmolLM2 compared with transformers on the same dequantized FP8 weights: logits, greedy tokens, KV cache."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from closeness import relative_l2
from numpy.typing import NDArray
from reference import Reference

from numba_atomflow import Engine, SamplingParams

LIMIT = 1e-3
NATS = 1e-3
SAME = 1e-4  # two ways through the same kernels: 30 layers of float32 sums in another order

PROMPTS = {
    "prose": (
        "The lighthouse keeper climbed the stairs every evening at dusk, carrying oil for the lamp and a book that he"
    ),
    "code": (
        "```python\ndef binary_search(values, wanted):\n    low, high = 0, len(values)\n    while low < high:\n"
        "        middle = (low + high) // 2\n        if values[middle] < wanted:\n            low = middle + 1\n"
        "        else:\n            high = middle\n    return low\n```\nThis function returns the index of"
    ),
    "chat": (
        "<|im_start|>system\nYou are a careful teacher of physics.<|im_end|>\n<|im_start|>user\nI read that the sky is "
        "blue because of Rayleigh scattering, which goes with the inverse fourth power of the wavelength. If violet "
        "light has a shorter wavelength than blue light, why is the sky not violet? Please mention the spectrum of the "
        "sun, what the upper atmosphere absorbs, and how sensitive human eyes are. Then explain in two sentences why "
        "sunsets are red, and say whether the same would hold on Mars, where fine dust hangs in a thin atmosphere: "
        "there the daytime sky looks butterscotch, while the sky around the setting sun turns blue. Finish with one "
        "question that a curious student of fourteen years could answer with a glass of milk and a torch.<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
}
each_prompt = pytest.mark.parametrize("name", PROMPTS)


@pytest.fixture(scope="module")
def engine(smollm2_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(smollm2_checkpoint, max_seq_len=512) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path, engine: Engine) -> Reference:
    return Reference(smollm2_gguf, engine.checkpoint)


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> dict[str, list[int]]:
    return {name: engine.text.encode(text) for name, text in PROMPTS.items()}


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: dict[str, list[int]]) -> dict[str, NDArray[np.float32]]:
    return {name: reference.logits(tokens) for name, tokens in prompts.items()}


def check(got: NDArray[np.float32], expected: NDArray[np.float32], limit: float = LIMIT) -> None:
    """At every position: relative L2 error within the limit, and the same arg-max token."""
    errors = [relative_l2(a, b) for a, b in zip(got, expected, strict=True)]
    worst = int(np.argmax(errors))
    share = f"relative L2 {errors[worst]:.3g} is {errors[worst] / limit:.1%} of {limit} at position {worst}"
    print(share)
    assert np.isfinite(errors).all()
    assert errors[worst] <= limit, share
    wrong = np.flatnonzero(got.argmax(axis=1) != expected.argmax(axis=1))
    assert not wrong.size, f"another token is most likely at positions {wrong.tolist()} ({share})"


def test_the_prompts_are_short_and_long(prompts: dict[str, list[int]]) -> None:
    lengths = sorted(len(tokens) for tokens in prompts.values())
    assert 16 <= lengths[0] < 40
    assert 150 < lengths[-1] <= 200


@pytest.mark.sampled(1)
@each_prompt
def test_log_probabilities_of_every_token_and_of_the_most_likely_ones(
    name: str, engine: Engine, prompts: dict[str, list[int]], expected: dict[str, NDArray[np.float32]]
) -> None:
    engine.reset()
    params = SamplingParams(max_tokens=1, logprobs=5, prompt_logprobs=5)
    reply = engine.generate_tokens(prompts[name], params).finish()
    logits = expected[name].astype(np.float64)
    rows = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    entries = [entry for entry in (*reply.prompt_logprobs, *reply.logprobs) if entry is not None]
    assert len(entries) == len(rows)
    worst = 0.0
    for row, token, entry in zip(rows, [*prompts[name][1:], *reply.token_ids], entries, strict=True):
        ours = np.array([entry.logprob, *(likely.logprob for likely in entry.top)])
        worst = max(worst, float(np.abs(ours - [row[token], *np.sort(row)[:-6:-1]]).max()))
    print(f"{name}: {len(rows)} tokens, at most {worst:.2g} nats")
    assert worst <= NATS


@pytest.mark.sampled(1)
@each_prompt
def test_logits_of_a_block(engine: Engine, prompts, expected, name: str) -> None:
    engine.reset()
    check(engine.feed(prompts[name], all_logits=True), expected[name])


@pytest.mark.sampled(1)
@each_prompt
def test_logits_token_by_token(engine: Engine, prompts, expected, name: str) -> None:
    engine.reset()
    check(np.stack([engine.feed([token]) for token in prompts[name]]), expected[name])


@pytest.mark.sampled(1)
@each_prompt
def test_64_greedy_tokens(engine: Engine, reference: Reference, prompts, name: str) -> None:
    engine.reset()
    reply = engine.generate(prompts[name], SamplingParams(max_tokens=64, ignore_eos=True)).finish()
    assert reply.token_ids == reference.greedy(prompts[name], 64)


def test_rewinding_and_reusing_equal_a_fresh_engine(
    engine: Engine, smollm2_checkpoint: Path, prompts, expected
) -> None:
    prose, code = prompts["prose"], prompts["code"]
    engine.reset()
    engine.feed(prose[:10])
    engine.feed(code)  # its keys and values must not be used again
    engine.rewind(10)
    again = engine.feed(prose[10:], all_logits=True)
    check(again, expected["prose"][10:])
    with Engine.load(smollm2_checkpoint, max_seq_len=512) as fresh:
        fresh.feed(prose[:10])
        np.testing.assert_array_equal(fresh.feed(prose[10:], all_logits=True), again)
        fresh.reset()
        check(again, fresh.feed(prose, all_logits=True)[10:], SAME)


def test_a_chat_of_two_turns_reuses_the_cache_and_equals_a_fresh_run(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    engine.reset()
    first = engine.chat(messages, params).finish()
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And which river flows through it?"},
    ]
    second = engine.chat(messages, params).finish()
    # Everything up to the first reply's end is there already; only what follows is computed.
    assert second.stats.reused_tokens >= first.stats.prompt_tokens + first.stats.tokens - 2
    assert second.stats.reused_tokens < second.stats.prompt_tokens
    engine.reset()
    fresh = engine.chat(messages, params).finish()
    assert fresh.stats.reused_tokens == 0
    assert fresh.token_ids == second.token_ids
    assert fresh.text == second.text


def test_the_limit_detects_other_weights(engine: Engine, reference: Reference, prompts, expected) -> None:
    """The limit is far below the effect of FP8 quantization, so it detects unquantized weights."""
    up = reference.model.model.layers[3].mlp.up_proj.weight
    column = up.data[:, 17].clone()
    up.data[:, 17] *= 1.5
    changed = reference.logits(prompts["prose"])
    up.data[:, 17] = column
    assert max(map(relative_l2, changed, expected["prose"])) > 3 * LIMIT
