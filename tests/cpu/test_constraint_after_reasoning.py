"""A constraint that begins after the reasoning, token by token and in random replies."""

import json

import numpy as np
import pytest
from tiny_models import tiny_tokenizer
from tokenizers import AddedToken
from toy_tokenizers import byte_level, sentencepiece

from numba_atomflow.constraints import AfterReasoning, Choice, JsonSchema
from numba_atomflow.constraints.base import ConstraintState
from numba_atomflow.sampling import Sampler, SamplingParams, tokens_of
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.text.reasoning import split_reasoning
from numba_atomflow.text.token_table import TokenTable

pytest.importorskip("llguidance")

TAGS = ("</think>", "</think>\n", ">{", "</think>{")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["x"],
    "additionalProperties": False,
}


def table(kind: str) -> TokenTable:
    """Tags as tokens of their own, or spelled; and tokens in which something follows the closing tag."""
    tokenizer, eos = (tiny_tokenizer(), 1) if kind == "bytes" else (sentencepiece()[0], 2)
    if kind == "tags":
        tokenizer, eos = byte_level()[0], 1
        tokenizer.add_tokens(
            [AddedToken(text, normalized=False) for text in ("</think>", "</think>\n", ">{", "</think>{")]
        )
    assets = TextAssets(tokenizer.to_str().encode(), eos_ids=(eos,))
    return TokenTable(assets, TokenTable(assets, 0).codec.vocabulary_size)


@pytest.fixture(scope="module", params=["bytes", "tags", "sentencepiece"])
def tokens(request: pytest.FixtureRequest) -> TokenTable:
    return table(request.param)


def allowed(state: ConstraintState, tokens: TokenTable) -> dict[bytes, int]:
    """Tokens by their bytes, which a SentencePiece tokenizer may have twice."""
    mask = state.allowed()
    assert mask is not None
    return {tokens.spellings[token]: int(token) for token in tokens_of(mask, tokens.vocabulary)}


def accept(state: ConstraintState, tokens: TokenTable, text: str) -> None:
    """Byte by byte; each has to be allowed."""
    for byte in text.encode():
        choices = allowed(state, tokens)
        assert bytes([byte]) in choices, (text, bytes([byte]))
        state.accept(choices[bytes([byte])])


def test_reasoning_is_free_and_the_answer_is_not(tokens: TokenTable) -> None:
    state = AfterReasoning(Choice(["yes", "no"])).start(tokens)
    eos = tokens.spellings[tokens.eos_ids[0]]
    accept(state, tokens, "<think>any < text </thin </think")
    assert eos not in allowed(state, tokens)
    assert b"q" in allowed(state, tokens)
    assert not {b">{", b"</think>{"} & set(allowed(state, tokens))
    assert not state.is_complete()
    accept(state, tokens, ">")
    assert {b"y", b"n", b"\n", b" "} <= set(allowed(state, tokens))
    assert b"q" not in allowed(state, tokens)
    accept(state, tokens, "\n")
    assert set(allowed(state, tokens)) <= {b"y", b"n", b"ye", b"yes", b"no"}
    accept(state, tokens, "no")
    assert state.is_complete()
    assert set(allowed(state, tokens)) == {eos}


def test_a_reply_may_answer_at_once(tokens: TokenTable) -> None:
    state = AfterReasoning(Choice(["yes"])).start(tokens)
    assert b"<" in allowed(state, tokens)
    accept(state, tokens, "yes")
    assert state.is_complete()


def test_an_opening_tag_that_is_begun_is_finished(tokens: TokenTable) -> None:
    state = AfterReasoning(Choice(["yes"])).start(tokens)
    accept(state, tokens, "<th")
    assert b"y" not in allowed(state, tokens)
    assert set(allowed(state, tokens)) <= {b"i", b"in", b"ink", b"ink>"}


def test_tags_may_be_tokens() -> None:
    tokens = table("tags")
    state = AfterReasoning(Choice(["yes"])).start(tokens)
    state.accept(tokens.spellings.index(b"<think>"))
    assert b"</think>{" not in allowed(state, tokens)
    assert b"</think>\n" in allowed(state, tokens)
    state.accept(tokens.spellings.index(b"</think>"))
    accept(state, tokens, "yes")
    assert state.is_complete()


@pytest.mark.parametrize("opened", [False, True])
def test_random_replies_have_an_answer_that_satisfies_the_schema(opened: bool, tokens: TokenTable) -> None:
    """The closing tag is made likely, as a model would."""
    reasoned = 0
    for seed in range(6):
        state = AfterReasoning(JsonSchema(POINT), opened).start(tokens)
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), tokens.vocabulary, (), state)
        stream, text = tokens.codec.stream(), ""
        closing = iter(b"...<... </think>")
        while True:
            logits = np.zeros(tokens.vocabulary, np.float32)
            inside = (opened or text.startswith("<think>")) and "</think>" not in text
            if inside and (byte := next(closing, None)) is not None:
                logits[[token for token, text in enumerate(tokens.spellings) if text == bytes([byte])]] = 50
            elif not text:
                logits[[token for token, text in enumerate(tokens.spellings) if text == b"<"]] = 6
            token = sampler.choose(logits)
            if token in tokens.eos_ids:
                break
            text += stream.push(token)
        parts = split_reasoning(text, opened)
        answer = json.loads(parts.answer)
        assert 0 <= answer["x"] <= 9
        reasoned += bool(parts.reasoning)
    assert reasoned
