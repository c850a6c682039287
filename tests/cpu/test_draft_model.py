"""Speculative decoding with a draft model: the text is that without, and the draft model's KV cache follows it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest
from numpy.typing import NDArray
from step_costs import with_cheap_draft
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Verification
from numba_atomflow.convert import convert
from numba_atomflow.errors import CheckpointError, ClosedError, ContextError, OptionError

PROMPT = [40, 50, 60, 70, 80, 40, 50, 60]
SAMPLED = {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 11}
POSITIONS = 128


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models of one tokenizer: `target`; `other`, with other weights; `short`, of 40 positions; `padded`,
    with rows of its embedding that are no tokens.
    """
    folder = tmp_path_factory.mktemp("drafts")
    geometry = tiny_geometry(vocabulary=SMALLEST_VOCABULARY)
    geometries = {
        "target": geometry,
        "other": replace(geometry, layers=1),
        "short": replace(geometry, max_positions=40),
        "padded": replace(geometry, layers=1, vocabulary=SMALLEST_VOCABULARY + 61),
    }
    paths = {}
    for seed, (name, sizes) in enumerate(geometries.items()):
        write_hf_folder(folder / name, sizes, seed=seed if name in ("other", "padded") else 0)
        paths[name] = convert(folder / name, folder / f"{name}.safetensors")
    return paths


@pytest.fixture(scope="module")
def target(checkpoints: dict[str, Path]) -> Iterator[Engine]:
    with Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1) as engine:
        yield engine


@pytest.fixture(params=["itself", "other"])
def draft(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Engine]:
    name = "target" if request.param == "itself" else request.param
    with Engine.load(checkpoints[name], "cpu", POSITIONS, threads=1) as engine:
        yield engine


def plain(target: Engine, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    target.reset()
    tokens = target.generate_tokens(prompt, SamplingParams(speculate="off", **options)).finish().token_ids
    target.reset()
    return tokens


# --- the same text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_tokens_are_those_without(target: Engine, draft: Engine, options: dict[str, Any]) -> None:
    options = options | {"max_tokens": 60, "ignore_eos": True}
    expected = plain(target, **options)
    engine = with_cheap_draft(target, draft)
    for speculate in ("draft", "auto"):
        engine.reset()
        reply = engine.generate_tokens(PROMPT, SamplingParams(speculate=speculate, **options)).finish()
        assert reply.token_ids == expected
        assert reply.stats.proposed > 0
        assert reply.stats.steps + reply.stats.accepted == reply.stats.tokens - 1
        assert 0 < reply.stats.drafting_seconds < reply.stats.decode_seconds


def test_a_model_as_its_own_draft_is_always_right(target: Engine, checkpoints: dict[str, Path]) -> None:
    with Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1) as draft:
        engine = with_cheap_draft(target, draft)
        stats = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=90, ignore_eos=True)).finish().stats
    assert stats.accepted == stats.proposed
    assert stats.steps <= 1 + -(-89 // 7)


def test_a_draft_that_is_always_wrong_is_asked_less_and_less(
    target: Engine, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain(target, ignore_eos=True)
    with Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1) as draft:
        engine, asked = with_cheap_draft(target, draft), list[int]()

        def wrong(token_ids: Sequence[int], count: int) -> Any:
            asked.append(count)
            right = Engine.continue_greedily(draft, token_ids, count)
            return right._replace(tokens=[token ^ 1 for token in right.tokens])

        monkeypatch.setattr(draft, "continue_greedily", wrong)
        reply = engine.generate_tokens(PROMPT, SamplingParams(ignore_eos=True)).finish()
    assert (reply.token_ids, reply.stats.accepted) == (expected, 0)
    assert 0 < reply.stats.proposed < 0.1 * len(expected)
    assert reply.stats.steps == len(expected) - 1


def test_stop_strings_eos_and_max_tokens_end_a_reply_as_without(
    target: Engine, draft: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SAMPLED | {"max_tokens": 40}
    text = target.generate(PROMPT, SamplingParams(speculate="off", ignore_eos=True, **options)).finish()
    stop = text.text[len(text.text) // 2 :][:2]
    for eos, more in (((), {"stop": stop}), ((text.token_ids[20],), {}), ((), {"max_tokens": 7})):
        assets = replace(target.checkpoint.text, eos_ids=eos)
        monkeypatch.setattr(target.checkpoint, "text", assets)
        params = SamplingParams(**options | more)
        target.reset()
        expected = target.generate(PROMPT, replace(params, speculate="off")).finish()
        position = target.position
        engine = with_cheap_draft(target, draft)
        reply = engine.generate(PROMPT, params).finish()
        assert (reply.text, reply.token_ids) == (expected.text, expected.token_ids)
        assert (reply.finish_reason, engine.position) == (expected.finish_reason, position)


def test_log_probabilities_are_those_without(target: Engine, draft: Engine) -> None:
    options: dict[str, Any] = {**SAMPLED, "max_tokens": 30, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 1}
    target.reset()
    expected = target.generate_tokens(PROMPT, SamplingParams(**options, speculate="off")).finish()
    reply = with_cheap_draft(target, draft).generate_tokens(PROMPT, SamplingParams(**options)).finish()
    assert (reply.logprobs, reply.prompt_logprobs) == (expected.logprobs, expected.prompt_logprobs)


class Half:
    """Allows half of the tokens, other ones at every place."""

    def __init__(self) -> None:
        self.words = np.zeros(-(-SMALLEST_VOCABULARY // 32), "<u4")
        self.came = 0

    def start(self, tokens: Any) -> "Half":
        return Half()

    def allowed(self) -> NDArray[np.uint32]:
        self.words[:] = 0x55555555 << self.came % 2
        return self.words

    def accept(self, token: int) -> None:
        self.came += 1

    def is_complete(self) -> bool:
        return True


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_constraints_hold_for_accepted_tokens(target: Engine, draft: Engine, options: dict[str, Any]) -> None:
    options = options | {"max_tokens": 40, "constraint": Half()}
    expected = plain(target, **options)
    reply = with_cheap_draft(target, draft).generate_tokens(PROMPT, SamplingParams(**options)).finish()
    assert reply.token_ids == expected
    assert all(token % 2 == place % 2 for place, token in enumerate(expected))
    assert reply.stats.proposed > 0


# --- the draft model's KV cache --------------------------------------------------------------------------------------


def test_the_draft_takes_in_what_is_new(target: Engine, draft: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt once, then what was accepted: in a conversation, the rest of each turn."""
    engine, fed = with_cheap_draft(target, draft), list[int]()

    def counted(token_ids: Sequence[int], count: int) -> Any:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(draft.token_ids, token_ids[:-1], strict=False))
        new = len(token_ids) - len(list(shared))
        tokens = Engine.continue_greedily(draft, token_ids, count)
        assert draft.token_ids == [*token_ids, *tokens.tokens[:-1]]
        assert tokens.fed == new
        fed.append(tokens.fed)
        return tokens

    monkeypatch.setattr(draft, "continue_greedily", counted)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    text = list(PROMPT)
    for turn in ([], [90, 91, 92], [93, 94]):
        text += turn
        before = len(fed)
        text += engine.generate_tokens(text, params).finish().token_ids
        assert fed[before] <= (len(PROMPT) + 1 if not turn else 20 + len(turn) + 1)
        assert all(count <= 8 for count in fed[before + 1 :])
    assert sum(fed) <= 2 * len(text)


def test_other_uses_of_the_draft_engine_change_nothing(target: Engine, draft: Engine) -> None:
    expected = plain(target, max_tokens=30, ignore_eos=True)
    engine = with_cheap_draft(target, draft)
    reply = engine.generate_tokens(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))
    tokens = [next(reply) for _ in range(10)]
    draft.generate_tokens([9, 8, 7], SamplingParams(max_tokens=9)).finish()
    assert [*tokens, *reply] == expected


def test_a_greedy_continuation_is_that_of_greedy_decoding(target: Engine) -> None:
    expected = plain(target, max_tokens=POSITIONS - len(PROMPT) + 1, ignore_eos=True)
    assert target.continue_greedily(PROMPT, 5) == (expected[:5], len(PROMPT), ANY)
    text = [*PROMPT, *expected[:5]]
    assert target.continue_greedily(text, 3)[:2] == (expected[5:8], 1)
    assert target.token_ids == [*text, *expected[5:7]]
    assert target.continue_greedily([*PROMPT, *expected[:-1]], 1).tokens == expected[-1:]
    for text, count in (([], 1), (PROMPT, 0)):
        with pytest.raises(OptionError, match="give at least one of each"):
            target.continue_greedily(text, count)
    with pytest.raises(ContextError, match="8 tokens and 121 after them do not fit into the context, which holds 128"):
        target.continue_greedily(PROMPT, POSITIONS - len(PROMPT) + 2)


@pytest.mark.parametrize("prefix", [[], PROMPT], ids=["a text", "the end of a text"])
@pytest.mark.parametrize("token", [True, 4.0, "4", None, [4], np.float32(4)])
def test_tokens_to_continue_are_whole_numbers(target: Engine, prefix: list[int], token: Any) -> None:
    target.reset()
    for text in ([*prefix, token, 5], (*prefix, token)):
        with pytest.raises(OptionError, match="Token ids must be a flat list of whole numbers"):
            target.continue_greedily(text, 2)


@pytest.mark.parametrize("text", [5, None, "text", b"text", {1: 2}, np.zeros((2, 2), np.int64)])
def test_a_text_to_continue_is_a_flat_list(target: Engine, text: Any) -> None:
    with pytest.raises(OptionError, match="Token ids must be a flat list of whole numbers"):
        target.continue_greedily(text, 2)


def test_a_token_to_continue_is_not_negative(target: Engine) -> None:
    expected = target.continue_greedily(PROMPT, 3).tokens
    with pytest.raises(OptionError, match="Token -1 does not exist"):
        target.continue_greedily([*PROMPT, -1], 2)
    assert target.token_ids == PROMPT
    assert target.continue_greedily(np.array(PROMPT, np.int32), 3).tokens == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2.0, True, "2", None])
def test_a_number_of_tokens_to_continue_by_is_whole(target: Engine, count: Any) -> None:
    with pytest.raises(OptionError, match=r"count is .*; it must be a whole number"):
        target.continue_greedily(PROMPT, count)


def test_a_draft_without_a_name_is_no_model(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match=r"^draft is ''; it must be the path of a file"):
        Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1, draft="")


def test_a_draft_with_fewer_positions_stops_proposing(target: Engine, checkpoints: dict[str, Path]) -> None:
    expected = plain(target, ignore_eos=True)
    with Engine.load(checkpoints["short"], "cpu", threads=1) as draft:
        assert draft.max_seq_len == 40
        engine = with_cheap_draft(target, draft)
        reply = engine.generate_tokens(PROMPT, SamplingParams(ignore_eos=True)).finish()
        assert (reply.token_ids, reply.finish_reason) == (expected, "context")
        assert 0 < reply.stats.proposed <= 40 - len(PROMPT)
        long = engine.generate_tokens([*PROMPT] * 6, SamplingParams(max_tokens=8, ignore_eos=True)).finish()
        assert long.stats.proposed == 0


def test_padding_of_the_vocabulary_is_never_proposed_and_never_read(
    checkpoints: dict[str, Path], target: Engine
) -> None:
    with Engine.load(checkpoints["padded"], "cpu", POSITIONS, threads=1) as padded:
        expected = plain(target, max_tokens=40, ignore_eos=True)
        reply = with_cheap_draft(target, padded).generate_tokens(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
        assert reply.finish().token_ids == expected
        beyond = [*PROMPT, SMALLEST_VOCABULARY + 3]
        with Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1) as smaller:
            assert smaller.continue_greedily(beyond, 3).tokens == []
            engine = with_cheap_draft(padded, smaller)
            reply = engine.generate_tokens(beyond, SamplingParams(max_tokens=20, ignore_eos=True)).finish()
            assert reply.stats.proposed == 0


# --- loading and closing ---------------------------------------------------------------------------------------------


def test_an_engine_is_loaded_and_closed_with_its_draft(checkpoints: dict[str, Path]) -> None:
    with Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1, draft=checkpoints["short"]) as engine:
        draft = engine.draft
        assert draft is not None
        assert (draft.max_seq_len, draft.backend.name) == (40, "cpu")
        assert draft.backend.threads == 1  # type: ignore[attr-defined]
        tokens = engine.generate("Hello", SamplingParams(max_tokens=4, speculate="draft")).finish().token_ids
        assert tokens == engine.generate("Hello", SamplingParams(max_tokens=4, speculate="off")).finish().token_ids
        engine.warm_up()
        reply = engine.generate("Hello", SamplingParams(speculate="draft", ignore_eos=True))
        next(reply)
        assert engine.draft is draft
        engine.use_draft(draft)  # once more
        assert draft.feed([5]).shape == (SMALLEST_VOCABULARY,)
    with pytest.raises(ClosedError):
        draft.feed([5])
    assert reply.finish_reason == "interrupted"


def test_a_draft_of_the_caller_stays_open(target: Engine, draft: Engine) -> None:
    target.use_draft(draft)
    assert target.draft is draft
    reply = target.generate_tokens(PROMPT)
    next(reply)
    target.use_draft(None)
    assert target.draft is None
    assert reply.finish_reason == "interrupted"
    draft.reset()
    assert draft.feed([5]).shape == (SMALLEST_VOCABULARY,)
    with pytest.raises(OptionError, match='speculate is "draft", but the engine has no draft model'):
        target.generate_tokens(PROMPT, SamplingParams(speculate="draft"))


def test_a_draft_with_other_tokens_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    write_hf_folder(folder, tiny_geometry(vocabulary=SMALLEST_VOCABULARY))
    tokenizer = folder / "tokenizer.json"
    record = json.loads(tokenizer.read_text())
    ids = record["model"]["vocab"]
    ids["q"], ids["Q"] = ids["Q"], ids["q"]
    tokenizer.write_text(json.dumps(record))
    changed = convert(folder, tmp_path / "changed.safetensors")
    with pytest.raises(OptionError, match=r"changed\.safetensors cannot be the draft model of target\.safetensors: "):
        Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1, draft=changed)


def test_what_cannot_be_a_draft_is_refused(
    target: Engine, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OptionError, match="An engine cannot be its own draft model; load the model twice"):
        target.use_draft(target)
    with pytest.raises(OptionError, match=r"draft is 'other'; it must be an engine"):
        target.use_draft("other")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="nowhere"):
        Engine.load(checkpoints["target"], "cpu", threads=1, draft="nowhere.safetensors")
    with Engine.random(tiny_geometry(), "cpu", 16, threads=1) as nameless:
        with pytest.raises(OptionError, match="only one of them has a tokenizer"):
            target.use_draft(nameless)
        larger = Engine.random(tiny_geometry(vocabulary=300), "cpu", 16, threads=1)
        with larger, pytest.raises(OptionError, match="no tokenizers, and vocabularies of different sizes"):
            nameless.use_draft(larger)
    monkeypatch.setattr(type(target.backend), "verification", Verification(1, "it is a test"))
    with pytest.raises(OptionError, match="cannot check several tokens in one step: it is a test"):
        Engine.load(checkpoints["target"], "cpu", POSITIONS, threads=1, draft=checkpoints["other"])
