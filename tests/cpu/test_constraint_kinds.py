"""JSON schemas, regular expressions and grammars: random texts that satisfy them, for tokenizers of all kinds."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import EOS, tiny_tokenizer
from toy_tokenizers import byte_level, sentencepiece

from numba_atomflow.constraints import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex, ToolCalls
from numba_atomflow.constraints.tools import MOST_CALLS
from numba_atomflow.errors import OptionError
from numba_atomflow.sampling import Sampler, SamplingParams, tokens_of
from numba_atomflow.sources.gguf_tokenizer import assets_from_gguf
from numba_atomflow.text.codec import TextAssets
from numba_atomflow.text.token_table import TokenTable
from numba_atomflow.text.tool_calls import HERMES, LLAMA3, CallDelta, ToolCallParser, ToolNotation

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", 'quoted "b"', "ü€", None, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
    "$defs": {
        "inner": {
            "anyOf": [
                {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"], "additionalProperties": False},
                {"type": "string", "pattern": "^[a-z]{2}-[0-9]{2}$"},
                {"type": "null"},
            ]
        }
    },
}

ASSETS: dict[str, Callable[[], TextAssets]] = {
    "bytes": lambda: TextAssets(tiny_tokenizer().to_str().encode(), eos_ids=(1,)),
    "byte-level": lambda: TextAssets(byte_level()[0].to_str().encode(), eos_ids=(1, 2)),
    "sentencepiece": lambda: TextAssets(sentencepiece()[0].to_str().encode(), eos_ids=(2,)),
    "gguf byte-level": lambda: assets_from_gguf(byte_level("qwen2")[1]),
    "gguf sentencepiece": lambda: assets_from_gguf(sentencepiece(["[INST]"])[1]),
}


@pytest.fixture(scope="module", params=ASSETS)
def tokens(request: pytest.FixtureRequest) -> TokenTable:
    table = TokenTable(ASSETS[request.param](), 0)
    return TokenTable(ASSETS[request.param](), table.codec.vocabulary_size + 5)  # an embedding with padding rows


@pytest.fixture(scope="module")
def bytes_only() -> TokenTable:
    return TokenTable(ASSETS["bytes"](), 264)


def random_reply(constraint: Constraint, tokens: TokenTable, seed: int, most: int = 400) -> str:
    """A text drawn from uniform logits, up to its EOS."""
    state = constraint.start(tokens)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), tokens.vocabulary, (), state)
    stream, text = tokens.codec.stream(), ""
    for _ in range(most):
        allowed = tokens_of(state.allowed(), tokens.vocabulary)  # type: ignore[arg-type]
        ends = [token for token in tokens.eos_ids if token in allowed]
        assert bool(ends) == state.is_complete()
        token = sampler.choose(np.zeros(tokens.vocabulary, np.float32))
        if token in tokens.eos_ids:
            return text + stream.flush()
        assert token not in tokens.special_ids
        text += stream.push(token)
    raise AssertionError(f"no end after {text!r}")


# --- texts -------------------------------------------------------------------------------------------------------


def test_random_replies_satisfy_a_schema(tokens: TokenTable) -> None:
    constraint = JsonSchema(PERSON)
    replies = [random_reply(constraint, tokens, seed) for seed in range(5)]
    for reply in replies:
        jsonschema.validate(json.loads(reply), PERSON)
        assert list(json.loads(reply))[:4] == ["name", "age", "kind", "tags"]
    assert len(set(replies)) > 1


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Regex(r"[0-9]{3}-(ab|ü)+?"), r"[0-9]{3}-(ab|ü)+?"),
        (Regex(r"[αβ€]{2}"), r"[αβ€]{2}"),
        (Choice(["yes", "no", 'say "no"']), r'yes|no|say "no"'),
        (Grammar('start: "x" (start "y" | "0")'), r"x+0y*"),
        (Grammar('root ::= "a" [bc]{2} tail\ntail ::= "d" | "e"'), r"a[bc][bc][de]"),
    ],
)
def test_random_replies_match(constraint: Constraint, pattern: str, tokens: TokenTable) -> None:
    for seed in range(2):
        assert re.fullmatch(pattern, random_reply(constraint, tokens, seed))


def test_a_json_object_is_one(bytes_only: TokenTable) -> None:
    state = JsonObject().start(bytes_only)
    for text, complete in [("{", False), ('"a": [1, {"b": null}]', False), ("}", True)]:
        for token in bytes_only.codec.encode(text):
            state.accept(token)
        assert state.is_complete() == complete


def test_a_schema_may_be_a_text(bytes_only: TokenTable) -> None:
    assert JsonSchema('{"const": 12}') == JsonSchema({"const": 12})
    assert random_reply(JsonSchema('{"const": 12}'), bytes_only, 0) == "12"


def test_white_space_between_values_is_bounded(bytes_only: TokenTable) -> None:
    state = JsonObject().start(bytes_only)
    space, brace = bytes_only.spellings.index(b" "), bytes_only.spellings.index(b"{")
    state.accept(brace)
    count = 0
    while space in tokens_of(state.allowed(), bytes_only.vocabulary):
        state.accept(space)
        count += 1
    assert count == 32


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the keywords that people use, whose values are small."""
    deeper, number = (lambda: random_schema(choose, depth + 1)), choose.randint
    flat: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "integer", "minimum": number(-50, 0), "exclusiveMaximum": number(1, 1000)},
        lambda: {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": number(2, 7)},
        lambda: {"type": "number", "minimum": number(-5, 0) + 0.5, "maximum": number(1, 100) + 0.25},
        lambda: {"type": "string", "minLength": number(0, 2), "maxLength": number(2, 6)},
        lambda: {"type": "string", "pattern": choose.choice(["^a[bc]{1,3}$", "^[0-9]{1,4}$", "^(foo|bar)?$"])},
        lambda: {"type": "string", "format": choose.choice(["date", "date-time", "uuid", "ipv4", "email"])},
        lambda: {"enum": choose.sample([1, "a", 'b"', None, True, [1], {"x": 2}, 1.5], number(1, 4))},
        lambda: {"const": choose.choice([1, "é", None, {"a": [1]}])},
        lambda: {"type": ["boolean", "null"]},
        lambda: {"allOf": [{"type": "integer", "minimum": 0}, {"maximum": number(1, 99)}]},
        lambda: {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    ]
    nested: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "array", "items": deeper(), "minItems": number(0, 2), "maxItems": number(2, 4)},
        lambda: {"type": "array", "prefixItems": [deeper(), deeper()], "items": False, "minItems": number(0, 2)},
        lambda: {"anyOf": [deeper() for _ in range(number(1, 3))]},
        lambda: _random_object(choose, deeper),
        lambda: _random_object(choose, deeper),
    ]
    return choose.choice(flat if depth == 3 else flat + 3 * nested)()


def _random_object(choose: random.Random, deeper: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    properties = {name: deeper() for name in choose.sample(["a", "b", "c", "d e", "é", '"'], choose.randint(1, 4))}
    required = choose.sample(list(properties), choose.randint(0, len(properties)))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@pytest.mark.parametrize("start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in (25, 50, 75, 100))])
def test_random_replies_satisfy_random_schemas(start: int, tokens: TokenTable) -> None:
    """Judged by another library."""
    for seed in range(start, start + 25, 5):
        schema = random_schema(random.Random(seed))
        reply = random_reply(JsonSchema(schema), tokens, seed, most=3000)
        jsonschema.validate(json.loads(reply), schema, format_checker=jsonschema.FormatChecker())


# --- tools -------------------------------------------------------------------------------------------------------

TOOLS: list[tuple[str, dict[str, Any] | None]] = [
    (
        'quoted "name"',
        {
            "properties": {"x": {"$ref": "#/$defs/digit"}},
            "required": ["x"],
            "additionalProperties": False,
            "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        },
    ),
    ("no_arguments", {"type": "object", "properties": {}, "additionalProperties": False}),
]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("notation", [HERMES, LLAMA3], ids=lambda notation: notation.name)
def test_random_calls_are_calls_of_the_tools(notation: ToolNotation, several: bool, tokens: TokenTable) -> None:
    schemas = dict(TOOLS)
    constraint, counts = ToolCalls(notation, TOOLS, several), set[int]()
    for seed in range(3):
        parser = ToolCallParser(notation, schemas)
        events = [*parser.push(random_reply(constraint, tokens, seed, most=2000)), *parser.flush()]
        calls = [event for event in events if isinstance(event, CallDelta)]
        assert calls == events
        for begin, arguments in zip(calls[::2], calls[1::2], strict=True):
            jsonschema.validate(json.loads(arguments.arguments), schemas[begin.name])
        counts.add(len(calls) // 2)
    assert 1 <= min(counts) <= max(counts) <= (MOST_CALLS if several else 1)


def test_tools_that_cannot_be_called_are_refused(bytes_only: TokenTable) -> None:
    with pytest.raises(OptionError, match="no tools"):
        ToolCalls(HERMES, [])
    with pytest.raises(OptionError, match="tool's schema cannot be used"):
        ToolCalls(HERMES, [("x", {"const": {1, 2}})])
    with pytest.raises(OptionError, match="tools' schemas have"):
        ToolCalls(HERMES, [("x" * 70_000, None)])
    with pytest.raises(OptionError, match=r"tools' schemas cannot be used .*Invalid type: objekt"):
        ToolCalls(HERMES, [("x", {"type": "objekt"})]).start(bytes_only)


# --- what is refused ---------------------------------------------------------------------------------------------

DEEP: Any = {}
for _ in range(100_000):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JsonSchema(3), "JSON schema is 3; it must be a JSON object"),  # type: ignore[arg-type]
        (lambda: JsonSchema("{,}"), "JSON schema cannot be used"),
        (lambda: JsonSchema("false"), "JSON schema is False; it must be a JSON object"),
        (lambda: JsonSchema({"const": float("nan")}), "no JSON"),
        (lambda: JsonSchema({"const": {1, 2}}), "no JSON"),
        (lambda: JsonSchema({"const": "\ud800"}), "surrogate"),
        (lambda: JsonSchema(DEEP), "nested too deeply"),
        (lambda: JsonSchema("[" * 60_000), "nested too deeply"),
        (lambda: JsonSchema({"const": "x" * 70_000}), "characters; give at most 65536"),
        (lambda: JsonSchema({"type": "objekt"}), "Invalid type: objekt"),
        (lambda: JsonSchema({"not": {"type": "string"}}), "Unimplemented keys"),
        (lambda: JsonSchema({"$ref": "http://127.0.0.1:1/x.json"}), "does not fetch resources"),
        (lambda: JsonSchema({"$ref": "file:///etc/passwd"}), "does not fetch resources"),
        (lambda: JsonSchema({"$ref": "#/$defs/missing"}), "does not exist"),
        (lambda: JsonSchema({"$ref": "#"}), r"JSON schema cannot be (used|satisfied)"),
        (lambda: JsonSchema({"type": "integer", "minimum": 5, "maximum": 4}), "Unsatisfiable"),
        (lambda: JsonSchema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (lambda: Regex("[0-9"), "regular expression cannot be used .*unclosed"),
        (lambda: Regex(""), "regular expression is ''"),
        (lambda: Regex("a" * 70_000), "characters; give at most 65536"),
        (lambda: Grammar("start: missing"), "grammar cannot be used"),
        (lambda: Grammar("start: start"), r"grammar cannot be (used|satisfied)"),
        (lambda: Grammar("root ::= (" + "(" * 5000), "grammar cannot be used"),
        (lambda: Grammar("root ::= 'a'"), "neither Lark, which begins with `start:`, nor GBNF"),
        (lambda: Grammar("root ::= a\n" * 2000), r"grammar \(GBNF\) has 22000 characters; give at most 16384"),
        (lambda: Grammar("root ::= missing"), "'missing' not found"),
        (lambda: Grammar(" \n"), "grammar is"),
        (lambda: Grammar(3), "grammar is 3"),  # type: ignore[arg-type]
        (lambda: Choice([]), "list of texts"),
        (lambda: Choice("yes"), "list of texts"),
        (lambda: Choice(["yes", ""]), "list of texts"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(
    make: Callable[[], Constraint], message: str, bytes_only: TokenTable
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        make().start(bytes_only)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 350


def test_a_grammar_that_grows_too_complex_is_refused_while_it_is_matched(bytes_only: TokenTable) -> None:
    """Ambiguous in the number of parts: the parser's limit ends it, not the memory."""
    constraint = Grammar(
        "start: " + " ".join(f"x{i}" for i in range(2500)) + "\n" + "".join(f'x{i}: "a" | \n' for i in range(2500))
    )
    state = constraint.start(bytes_only)
    letter = bytes_only.spellings.index(b"a")

    def match() -> None:
        for _ in range(3000):
            state.allowed()
            state.accept(letter)

    with pytest.raises(OptionError, match="grammar cannot be used"):
        match()


def test_eos_is_not_spelled(bytes_only: TokenTable) -> None:
    """The name of a special token in a constant is text, not the token."""
    reply = random_reply(JsonSchema({"const": EOS}), bytes_only, 0)
    assert json.loads(reply) == EOS
