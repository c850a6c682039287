"""Structured replies and tool calls over HTTP, by bare requests, OpenAI's client and LangChain."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, tiny_geometry, write_hf_folder, write_json

from numba_atomflow import Engine
from numba_atomflow.convert import convert

pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("llguidance", reason="pip install 'numba-atomflow[guided]'")
pytest.importorskip("jsonschema", reason="pip install jsonschema")

import jsonschema
from live_server import NAME, Live, events, live_server

from numba_atomflow.server.replies import ChatShape
from numba_atomflow.server.stream import Ended, Piece
from numba_atomflow.text.reasoning import ReasoningSplitter
from numba_atomflow.text.tool_calls import HERMES, ToolCallParser

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function | tojson }}\n{% endfor %}{% if tools %}<tool_call>\n{% endif %}"
    + CHAT_TEMPLATE
)
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["in", "out"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "move", "description": "Move there.", "parameters": POINT}},
    {"type": "function", "function": {"name": "wait", "parameters": {"type": "object", "additionalProperties": False}}},
]
MESSAGES = [{"role": "user", "content": "Go"}]


def tools_engine(folder: Path, template: str) -> Engine:
    """A random model with this chat template."""
    write_hf_folder(folder / "hf", tiny_geometry(max_positions=2048))
    config = json.loads((folder / "hf" / "tokenizer_config.json").read_text())
    write_json(folder / "hf" / "tokenizer_config.json", config | {"chat_template": template})
    return Engine.load(convert(folder / "hf", folder / "tools.safetensors"), backend="cpu", threads=1)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with tools_engine(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE) as engine, live_server(engine) as live:
        yield live


def chat(live: Live, **fields: Any) -> Any:
    body = {"messages": MESSAGES, "temperature": 1.5, "seed": 1, "max_tokens": 400} | fields
    return live.post("/v1/chat/completions", body)


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "point", "schema": schema, "strict": True}}


def joined(chunks: list[Any]) -> tuple[str, list[dict[str, Any]], str]:
    """Text, calls and finish reason of a stream."""
    text, calls, reason = "", list[dict[str, Any]](), ""
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        text += choice["delta"].get("content") or ""
        for part in choice["delta"].get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append({key: part[key] for key in ("id", "type", "function")})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return text, calls, reason


# --- form of the reply -------------------------------------------------------------------------------------------


def test_a_reply_has_the_form_of_a_schema_or_a_grammar(live: Live) -> None:
    for seed in range(3):
        (choice,) = chat(live, response_format=schema_format(POINT), seed=seed).body["choices"]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), POINT)
    content = chat(live, grammar='start: "yes" | "no"').body["choices"][0]["message"]["content"]
    assert content in ("yes", "no")
    body = {"prompt": "x", "grammar": 'root ::= "ab"{2}', "temperature": 0}
    assert live.post("/v1/completions", body).body["choices"][0]["text"] == "abab"
    reply = chat(live, response_format={"type": "json_object"}, max_tokens=3).body["choices"][0]
    assert reply["message"]["content"].startswith("{")
    assert chat(live, response_format={"type": "text"}, max_tokens=3).status == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": schema_format({"type": "objekt"})}, "response_format", "Invalid type: objekt"),
        ({"response_format": schema_format({"const": "x" * 70_000})}, "response_format", "give at most 65536"),
        ({"response_format": schema_format({"$ref": "file:///etc/passwd"})}, "response_format", "does not fetch"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        ({"response_format": schema_format(True)}, "response_format.json_schema.schema", "must be an object"),
        ({"response_format": {"type": "text", "strict": True}}, "response_format.strict", "'strict'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "The field tool_choice.function is missing"),
        ({"response_format": {"type": "yaml"}}, "response_format", "response_format.type is 'yaml'"),
        ({"grammar": "start: missing"}, "grammar", "The grammar cannot be used"),
        ({"grammar": 'start: "a"', "response_format": {"type": "json_object"}}, "response_format", "exclude each"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "must match"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "same name"),
        ({"tools": [TOOLS[0]] * 129}, "tools", "There are 129 tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are none"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice", "'fly'"),
        ({"grammar": 'start: "a"', "ignore_eos": True}, None, "ignore_eos"),
    ],
)
def test_what_cannot_be_used_is_refused(live: Live, fields: dict[str, Any], param: str | None, words: str) -> None:
    answer = chat(live, **fields)
    assert answer.status == 400
    error = answer.body["error"]
    assert words in error["message"]
    assert error["param"] == param


def test_a_model_without_tools_refuses_them(tiny_checkpoint: Path) -> None:
    with Engine.load(tiny_checkpoint, backend="cpu", threads=1) as engine, live_server(engine) as live:
        answer = chat(live, tools=TOOLS)
        assert answer.status == 400
        assert "chat template with tools" in answer.body["error"]["message"]
        assert chat(live, tools=[], tool_choice="auto", max_tokens=3).status == 200
        assert chat(live, tools=TOOLS, tool_choice="none", max_tokens=3).status == 200


# --- tools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"move", "wait"}), ({"type": "function", "function": {"name": "move"}}, {"move"})],
)
def test_required_calls_are_calls(live: Live, choice: Any, names: set[str]) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    (whole,) = chat(live, **fields).body["choices"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    (call,) = whole["message"]["tool_calls"]
    function = call["function"]
    assert function["name"] in names
    jsonschema.validate(json.loads(function["arguments"]), POINT if function["name"] == "move" else {})

    text, (streamed,), reason = joined(events(chat(live, stream=True, **fields).body))
    assert (text, reason) == ("", "tool_calls")
    assert streamed["function"] == function
    assert streamed["id"].startswith("call_")


def test_the_model_is_told_of_the_tools_and_of_earlier_calls(live: Live) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "move", "arguments": '{"x": 3, "kind": "in"}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "moved"},
    ]
    sizes = [
        chat(live, messages=messages, max_tokens=1, **fields).body["usage"]["prompt_tokens"]
        for messages in (MESSAGES, history)
        for fields in ({}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"})
    ]
    assert sizes[1] > sizes[0] == sizes[2]
    assert sizes[4] - sizes[3] == sizes[1] - sizes[0]


def test_text_and_calls_of_a_reply_are_told_apart() -> None:
    reply = 'Well. <tool_call>\n{"name": "move", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>{"name": "fly"}'
    pieces = [Piece(0, reply[i : i + 5], [], False) for i in range(0, len(reply), 5)]
    ended = Ended(0, "eos", 3, 0, len(pieces))
    stream, whole = (ChatShape(NAME, True, calls=ToolCallParser(HERMES, ["move"])) for _ in range(2))
    chunks = [chunk for event in [*pieces, ended] for chunk in stream.chunks(event)] + ["[DONE]"]
    for event in [*pieces, ended]:
        whole.add(event)
    text, (call,), reason = joined(chunks)
    (choice,) = whole.whole()["choices"]
    assert text == choice["message"]["content"] == 'Well.\n<tool_call>{"name": "fly"}'
    assert call["function"] == choice["message"]["tool_calls"][0]["function"]
    assert call["function"] == {"name": "move", "arguments": '{"x": 1}'}
    assert reason == choice["finish_reason"] == "tool_calls"


# --- reasoning ---------------------------------------------------------------------------------------------------


def test_reasoning_calls_and_text_are_told_apart() -> None:
    reply = '<think>\nHm, <tool_call>?\n</think>\n\nWell. <tool_call>{"name": "move", "arguments": {}}</tool_call>'
    pieces = [Piece(0, reply[i : i + 5], [], False) for i in range(0, len(reply), 5)]
    stream, whole = (
        ChatShape(NAME, False, calls=ToolCallParser(HERMES, ["move"]), reasoning=ReasoningSplitter()) for _ in range(2)
    )
    events = [*pieces, Ended(0, "eos", 3, 0, len(pieces))]
    deltas = [chunk["choices"][0]["delta"] for event in events for chunk in stream.chunks(event)]
    for event in events:
        whole.add(event)
    message = whole.whole()["choices"][0]["message"]
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    assert reasoning == message["reasoning_content"] == "Hm, <tool_call>?"
    assert message["content"] == "Well."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["move"]


@pytest.mark.parametrize("opened", [False, True])
def test_the_answer_after_the_reasoning_has_the_form(opened: bool, tmp_path: Path) -> None:
    """A template that mentions the tags is one of a model that reasons; it may open the reasoning itself."""
    end = "<think>\n" if opened else "{# <think> #}"
    with tools_engine(tmp_path, TOOL_TEMPLATE + end) as engine, live_server(engine) as live:
        (choice,) = chat(live, response_format=schema_format(POINT), temperature=0.0, max_tokens=60).body["choices"]
        message = choice["message"]
        if "reasoning_content" in message:
            assert choice["finish_reason"] == "length"  # a random model does not close the tag
            assert message["content"] == ""
        else:
            jsonschema.validate(json.loads(message["content"]), POINT)
        assert ("reasoning_content" in message) == opened


# --- clients -----------------------------------------------------------------------------------------------------


def test_openais_helpers_parse_replies_and_calls(live: Live) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    from pydantic import BaseModel, Field

    class Move(BaseModel):
        x: int = Field(ge=0, le=99)
        kind: str = Field(pattern="^(in|out)$")

    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 1.5, "seed": 2}
        reply = client.chat.completions.parse(response_format=Move, **fields)
        assert isinstance(reply.choices[0].message.parsed, Move)
        tools = [openai.pydantic_function_tool(Move, name="move")]
        reply = client.chat.completions.parse(tools=tools, tool_choice="required", **fields)
        assert isinstance(reply.choices[0].message.tool_calls[0].function.parsed_arguments, Move)
        with client.chat.completions.stream(
            tools=tools, tool_choice="required", parallel_tool_calls=False, **fields
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
        assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
        assert isinstance(final.message.tool_calls[0].function.parsed_arguments, Move)
        assert final.finish_reason == "tool_calls"


@pytest.mark.slow
def test_langchain_has_structured_output_and_tools(live: Live) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    from pydantic import BaseModel

    class Answer(BaseModel):
        """An answer."""

        yes: bool

    model = langchain_openai.ChatOpenAI(
        model=NAME, base_url=f"{live.url}/v1", api_key="none", temperature=1.5, seed=3, max_tokens=200, max_retries=0
    )
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Answer, method=method).invoke("Go"), Answer)
    (call, *_) = model.bind_tools([Answer], tool_choice="any").invoke("Go").tool_calls
    assert call["name"] == "Answer"
    assert isinstance(call["args"]["yes"], bool)
