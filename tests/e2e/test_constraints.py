"""Replies under a constraint, from the engine and the command line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import InProcess, assert_refused

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.constraints import Choice, Grammar, JsonSchema, Regex
from numba_atomflow.errors import OptionError
from numba_atomflow.speculation.drafter import StepResult

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "kind": {"enum": ["in", "out"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, "cpu", threads=1) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_replies_satisfy_the_schema(engine: Engine, temperature: float) -> None:
    params = SamplingParams(temperature, seed=1, max_tokens=200, constraint=JsonSchema(POINT))
    for prompt in ("a", "b"):
        reply = engine.generate(prompt, params).finish()
        assert reply.finish_reason == "eos"
        jsonschema.validate(json.loads(reply.text), POINT)
        assert reply.stats.constraint_seconds > 0
    assert engine.chat([{"role": "user", "content": "a"}], params).finish().finish_reason == "eos"


def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    params = SamplingParams(1.0, seed=5, max_tokens=100, constraint=Regex("[a-z]{40}"))
    replies = []
    for _ in range(2):
        engine.reset()
        replies.append(engine.generate("x", params).finish().text)
    assert replies[0] == replies[1]
    assert len(replies[0]) == 40


class Repeating:
    """A drafter that proposes what stands one period earlier: right but for the random letters."""

    def propose(self, token_ids: Sequence[int], limit: int) -> Sequence[int]:
        period = len("name: aba; ")
        return token_ids[-period : -period + limit]

    def observe(self, result: StepResult) -> None:
        pass


def test_speculation_changes_nothing(engine: Engine) -> None:
    constraint = Regex("(name: [ab]{3}; ){12}")
    params = SamplingParams(1.0, seed=2, max_tokens=140, constraint=constraint, speculate="off")
    replies = []
    for given, drafter in ((params, None), (replace(params, speculate="auto"), Repeating())):
        engine.reset()
        replies.append(engine.generate("name: aba; name: bab; ", given, drafter=drafter).finish())
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[1].stats.accepted > 20
    assert replies[1].stats.steps < replies[0].stats.steps


def test_a_reply_may_end_before_it_is_complete(engine: Engine) -> None:
    reply = engine.generate("x", SamplingParams(max_tokens=5, constraint=Regex("[a-z]{40}"))).finish()
    assert (reply.finish_reason, len(reply.text)) == ("max_tokens", 5)
    reply = engine.generate("x", SamplingParams(stop="no", constraint=Choice(["yes or no"]))).finish()
    assert (reply.finish_reason, reply.text) == ("stop", "yes or ")


def test_a_constraint_that_cannot_be_used_is_refused_before_the_prompt_is_computed(engine: Engine) -> None:
    engine.reset()
    with pytest.raises(OptionError, match="Invalid type"):
        engine.generate("x", SamplingParams(constraint=JsonSchema({"type": "text"})))
    assert engine.position == 0


def test_token_ids_may_be_constrained(engine: Engine) -> None:
    tokens = engine.generate_tokens([5, 6], SamplingParams(constraint=Grammar('start: "ab"'))).finish().token_ids
    assert engine.text.decode(tokens) == "ab"
    assert tokens[-1] in engine.checkpoint.text.eos_ids


# --- command line ------------------------------------------------------------------------------------------------


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_command_line_takes_a_schema_or_a_grammar(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    schema = written(tmp_path / "schema.json", json.dumps(POINT))
    command = ("generate", "a", "--model", tiny_checkpoint, "--backend", "cpu")
    outcome = cli(*command, "--json-schema", schema)
    assert outcome.code == 0
    jsonschema.validate(json.loads(outcome.out), POINT)
    assert "ms per token" in outcome.err

    grammar = written(tmp_path / "grammar.gbnf", 'root ::= "x"{3}')
    record: dict[str, Any] = json.loads(cli(*command, "--grammar", grammar, "--json").out)
    assert record["text"] == "xxx"
    assert record["stats"]["constraint_seconds"] > 0


def test_the_command_line_refuses_in_a_sentence(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    bad = written(tmp_path / "bad.json", "{,}")
    command = ("generate", "a", "--model", tiny_checkpoint, "--backend", "cpu")
    assert_refused(cli(*command, "--json-schema", bad), "JSON schema")
    assert_refused(cli(*command, "--grammar", bad), "grammar")
    assert_refused(cli(*command, "--json-schema", tmp_path / "missing"), "--json-schema", "missing")
    assert_refused(cli(*command, "--json-schema", bad, "--grammar", bad), "--json-schema", "--grammar")
    assert_refused(cli(*command, "--json-schema", bad, "--ignore-eos"))


# --- SmolLM2 -----------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "married": {"type": "boolean"},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "kind": {"enum": ["home", "work"]}},
            "required": ["city", "kind"],
            "additionalProperties": False,
        },
        "languages": {"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "married", "address", "languages"],
    "additionalProperties": False,
}


@pytest.mark.slow
def test_smollm2_never_violates_a_schema(smollm2_checkpoint: Path) -> None:
    message = [{"role": "user", "content": "Describe a person as JSON."}]
    complete = 0
    with Engine.load(smollm2_checkpoint, "cpu", max_seq_len=512, threads=1) as engine:
        for seed in range(3):
            params = SamplingParams(1.5, seed=seed, max_tokens=100, constraint=JsonSchema(PERSON))
            reply = engine.chat(message, params).finish()
            if reply.finish_reason == "eos":
                jsonschema.validate(json.loads(reply.text), PERSON)
                complete += 1
            else:
                assert reply.finish_reason == "max_tokens"
    assert complete
