"""Tool calls in generated text, in one piece and in pieces of any size."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numba_atomflow.text.tool_calls import (
    HERMES,
    LLAMA3,
    CallDelta,
    ToolCallParser,
    ToolNotation,
    tool_notation,
)

NAMES = ["weather", "say"]
ARGUMENTS = '{"city": "São {Paulo}", "days": [1, {"x": "\\"}"}]}'
HERMES_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
LLAMA3_CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'


def parsed(notation: ToolNotation, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and every call as name and arguments."""
    parser, text, calls = ToolCallParser(notation, NAMES), "", list[list[str]]()
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    for event in events:
        if isinstance(event, str):
            assert event
            text += event
        elif event.name is not None:
            assert event.index == len(calls)
            assert event.arguments == ""
            calls.append([event.name, ""])
        else:
            assert event.index == len(calls) - 1
            calls[-1][1] += event.arguments
    return text, [(name, arguments) for name, arguments in calls]


REPLIES: list[tuple[ToolNotation, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Hello <b>you</b> ", "Hello <b>you</b> ", []),
    (HERMES, HERMES_CALL, "", [("weather", ARGUMENTS)]),
    (HERMES, f"Let me see.\n\n{HERMES_CALL}\n", "Let me see.", [("weather", ARGUMENTS)]),
    (HERMES, f"{HERMES_CALL}\n{HERMES_CALL} Done.", " Done.", [("weather", ARGUMENTS)] * 2),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "say"}</tool_call>', "", [("say", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "say", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("say", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "say"}</tool_call>', "", [("say", "{}")]),
    (HERMES, '<tool_call>{"name": "say", "arguments": {}, "id": 3}</tool_call>', "", [("say", "{}")]),
    (HERMES, '<tool_call>{"name": "s\\u0061y", "arguments": {}}</tool_call>', "", [("say", "{}")]),
    (HERMES, '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),  # type: ignore[list-item]
    (HERMES, '<tool_call>{"name": 3}</tool_call> so', None, []),  # type: ignore[list-item]
    (HERMES, "<tool_call>[1, 2</tool_call>", None, []),  # type: ignore[list-item]
    (HERMES, '<tool_call>{"name": "say", "argum', None, []),  # type: ignore[list-item]
    (HERMES, '<tool_call>{"name": "say", "arguments": {"a": "b', "", [("say", '{"a": "b')]),  # max_tokens
    (HERMES, '<tool_call>{"arguments": {}, "name": "say"}', "", [("say", "{}")]),  # no end tag
    (HERMES, "a <tool_cal", "a <tool_cal", []),
    (LLAMA3, "The weather is {fine}.", "The weather is {fine}.", []),
    (LLAMA3, LLAMA3_CALL, "", [("weather", ARGUMENTS)]),
    (LLAMA3, f" {LLAMA3_CALL}; {LLAMA3_CALL}\n", "", [("weather", ARGUMENTS)] * 2),
    (LLAMA3, '{"parameters": {}, "name": "say"};' + LLAMA3_CALL, "", [("say", "{}"), ("weather", ARGUMENTS)]),
    (LLAMA3, LLAMA3_CALL + " and so on", "and so on", [("weather", ARGUMENTS)]),
    (LLAMA3, '{"name": "rm", "parameters": {}} {"name": "say", "parameters": {}}', None, []),  # type: ignore[list-item]
    (LLAMA3, '{"answer": {"x": 1}, "y": 2} is JSON', None, []),  # type: ignore[list-item]
    (LLAMA3, '{"text": "' + "long " * 200 + '"}', None, []),  # type: ignore[list-item]
    (LLAMA3, '{"name": "say", "parameters": {"a": 1', "", [("say", '{"a": 1')]),
]


@pytest.mark.parametrize(("notation", "reply", "text", "calls"), REPLIES)
def test_a_reply_is_separated_into_text_and_calls(
    notation: ToolNotation, reply: str, text: str | None, calls: list[tuple[str, str]]
) -> None:
    expected = (reply if text is None else text, calls)
    assert parsed(notation, [reply]) == expected
    assert parsed(notation, reply) == expected  # character by character


@given(case=st.sampled_from(REPLIES), data=st.data())
@settings(deadline=None)
def test_pieces_of_any_size_make_the_same(case: Any, data: st.DataObject) -> None:
    notation, reply, _, _ = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)), max_size=6)))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert parsed(notation, pieces) == parsed(notation, [reply])


@given(notation=st.sampled_from([HERMES, LLAMA3]), reply=st.text('{}"\\<>/tol_ca;n:me \n', max_size=60))
@settings(deadline=None)
def test_any_text_is_kept_or_a_call(notation: ToolNotation, reply: str) -> None:
    assert parsed(notation, reply) == parsed(notation, [reply]) == (reply, [])


def test_arguments_are_passed_on_as_they_arrive() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('Yes. <tool_call>{"name": "say", "argu') == ["Yes."]
    assert parser.push('ments": {"te') == [CallDelta(0, "say", ""), CallDelta(0, None, '{"te')]
    assert parser.push('xt": "}') == [CallDelta(0, None, 'xt": "}')]
    assert parser.push('"}}</tool') == [CallDelta(0, None, '"}')]
    assert parser.push("_call>") == []
    assert parser.flush() == []


def test_a_long_head_is_not_looked_at_with_each_piece() -> None:
    """Otherwise the time of a reply would grow with the square of its length."""
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('<tool_call>{"name": "say",' + " " * 600 + '"arguments": {"a": 1}') == []
    assert parser.push("}</tool_call>") == [CallDelta(0, "say", ""), CallDelta(0, None, '{"a": 1}')]


def test_text_is_not_held_back_for_long() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("a < b ") == ["a < b"]
    assert parser.push("and") == [" and"]


@pytest.mark.parametrize(
    ("template", "notation"),
    [
        (None, None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}", HERMES),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}', LLAMA3),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}", None),
    ],
)
def test_the_notation_is_the_templates(template: str | None, notation: ToolNotation | None) -> None:
    assert tool_notation(template) == notation
