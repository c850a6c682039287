"""Real prompts on the demo model: the same tokens with and without speculation, and how many are accepted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from step_costs import UnmeasuredCost

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.perf.workload import Prompt, read_workload
from numba_atomflow.speculation.prompt_lookup import PromptLookup

WORKLOADS = Path(__file__).parents[1] / "workloads"
NAMES = ("edit", "quote", "json", "chat")


@pytest.fixture(scope="module")
def engine(smollm2_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(smollm2_checkpoint, "cpu", max_seq_len=1024) as engine:
        yield engine


def check(engine: Engine, prompt: Prompt, max_tokens: int, **sampling: float) -> float:
    """Compare replies; the mean accepted length."""
    text = engine.text
    tokens = text.encode_chat([{"role": "user", "content": prompt.text}]) if prompt.chat else text.encode(prompt.text)
    plain, lookup = (
        SamplingParams(max_tokens=max_tokens, speculate=how, seed=5, **sampling)  # type: ignore[arg-type]
        for how in ("off", "lookup")
    )
    drafter = PromptLookup(UnmeasuredCost())
    engine.reset()
    expected = engine.generate_tokens(tokens, plain).finish()
    logits = engine.feed(expected.token_ids[-1:])
    engine.reset()  # a prompt that is in the cache already has its last token computed by itself, with other roundings
    reply = engine.generate_tokens(tokens, lookup, drafter=drafter).finish()
    assert (reply.token_ids, reply.finish_reason) == (expected.token_ids, expected.finish_reason)
    assert (engine.feed(reply.token_ids[-1:]) == logits).all()  # the KV cache is the same, too
    return reply.stats.mean_accepted_length


@pytest.mark.parametrize("name", ["json", "chat"])
def test_the_first_prompt_of_a_workload(engine: Engine, name: str) -> None:
    length = check(engine, read_workload(WORKLOADS / f"{name}.jsonl")[0], 32)
    assert length > 1.2 or name == "chat"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_second_prompt_of_a_workload(engine: Engine, name: str) -> None:
    """`bench --workload` compares the tokens of all of them."""
    length = check(engine, read_workload(WORKLOADS / f"{name}.jsonl")[1], 64)
    assert length > 1.2 or name == "chat"  # whose reply need not repeat anything


@pytest.mark.slow
def test_sampled_replies(engine: Engine) -> None:
    for name in ("edit", "chat"):
        prompt = read_workload(WORKLOADS / f"{name}.jsonl")[4]
        check(engine, prompt, 24, temperature=0.8, top_p=0.95, repetition_penalty=1.1)
