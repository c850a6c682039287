"""The chat's commands, messages of several lines, files, and reasoning: through a pipe and at a terminal."""

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import InProcess, Outcome, assert_refused
from scripted_models import write_scripted
from terminals import Terminal
from tiny_models import CHAT_TEMPLATE, write_json

CACHED = re.compile(r"prompt (\d+) tokens, (\d+) of them cached; reply (\d+) tokens")
QUOTES = '"""'

Talk = Callable[..., Outcome]


@pytest.fixture
def talk(cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Send lines to a chat through a pipe."""

    def talk(*lines: str, options: tuple[object, ...] = ("-n", 4), model: Path = tiny_checkpoint) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return cli("chat", "--model", model, *options)

    return talk


def saved(path: Path) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = json.loads(path.read_text())["messages"]
    return messages


def said(path: Path) -> list[str]:
    """What the user said."""
    return [message["content"] for message in saved(path) if message["role"] == "user"]


# --- messages of several lines --------------------------------------------------------------------------------------


MESSAGES = [
    (["one \\", " two\\", "three"], "one \n two\nthree"),
    ([QUOTES, "def f(x):", "", "    return x", QUOTES], "def f(x):\n\n    return x"),
    ([f"{QUOTES}first", f"  second {QUOTES} "], "first\n  second "),
    ([f"{QUOTES}one line{QUOTES}"], "one line"),
    ([QUOTES, "/reset", QUOTES], "/reset"),  # no command
    ([QUOTES, "a backslash\\", QUOTES], "a backslash\\"),
]


def test_messages_of_several_lines(talk: Talk, tmp_path: Path) -> None:
    lines = [line for lines, _ in MESSAGES for line in lines]
    outcome = talk(*lines, f"/save {tmp_path / 'chat.json'}", options=("-n", 1))
    assert outcome.code == 0
    assert said(tmp_path / "chat.json") == [message for _, message in MESSAGES]


@pytest.mark.parametrize("lines", [[QUOTES, "never closed"], ["ends in a backslash\\"]])
def test_a_message_that_the_end_of_input_ends(talk: Talk, lines: list[str]) -> None:
    assert len(CACHED.findall(talk(*lines).err)) == 1


# --- undo, retry, edit ----------------------------------------------------------------------------------------------


def test_undo_forgets_the_last_message_and_its_reply(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    outcome = talk("/undo", "one", "two", "/undo", "three", f"/save {file}", options=("-n", 4, "--system", "short"))
    assert "[there is no message to forget]" in outcome.err
    assert "[forgotten; the conversation has 3 messages now]" in outcome.err
    assert said(file) == ["one", "three"]
    assert [message["role"] for message in saved(file)] == ["system", "user", "assistant", "user", "assistant"]
    (first, _, reply), _, (_, cached, _) = (map(int, turn) for turn in CACHED.findall(outcome.err))
    assert cached >= first + reply - 1  # what the undone turn and the new one have in common


def test_retry_gives_another_reply_that_the_seed_decides(talk: Talk, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    sampled = ("-n", 8, "--temperature", 1, "--seed", 3)
    lines = ("/retry", "one", f"/save {first}", "/retry", f"/save {second}")
    outcome = talk(*lines, options=sampled)
    assert "[there is no message to reply to]" in outcome.err
    assert said(first) == said(second) == ["one"]
    assert len(saved(second)) == 2
    assert saved(first)[1] != saved(second)[1]
    assert outcome.out == talk(*lines[:2], "/retry", options=sampled).out  # the same seed, the same replies


def test_retry_of_greedy_decoding_says_that_nothing_changes(talk: Talk) -> None:
    outcome = talk("one", "/retry")
    assert "[without --temperature, every reply to a message is the same]" in outcome.err
    first, second = outcome.out.splitlines()
    assert first == second


def test_edit_needs_a_terminal(talk: Talk) -> None:
    outcome = talk("one", "/edit")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: /edit opens an editor, which needs a terminal")


def test_edit_several_lines_and_ctrl_c_at_a_terminal(
    at_terminal: Callable[..., Terminal],
    cli_home: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\ncat "$2" >"$1/before"; printf "changed\\n" >"$2"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", f"'{editor}' '{tmp_path}'")
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint, "-n", 3)
    terminal.expect("> ")
    terminal.type("a mistkae\n")
    terminal.expect(r"reply 3 tokens")
    terminal.type("/edit\n")
    terminal.expect(r"reply 3 tokens")
    assert (tmp_path / "before").read_text() == "a mistkae"
    terminal.type("/edit\n")
    terminal.expect("nothing was changed, and nothing sent")
    terminal.expect("> ")
    terminal.type(f"{QUOTES}\n")
    terminal.expect(r"\.\.\. ")
    terminal.type("two\n")
    terminal.expect(r"\.\.\. ")
    terminal.type(f"lines{QUOTES}\n")
    terminal.expect(r"reply 3 tokens")
    terminal.type(f"/save {tmp_path / 'chat.json'}\n")
    terminal.expect("saved to")
    assert said(tmp_path / "chat.json") == ["changed", "two\nlines"]
    assert len(saved(tmp_path / "chat.json")) == 4
    terminal.expect("> ")
    terminal.type("never finished \\\n")
    terminal.expect(r"\.\.\. ")
    terminal.press_ctrl_c_until(r"Ctrl-C again leaves")
    assert terminal.press_ctrl_c_until_it_leaves() == 0


@pytest.mark.slow
def test_an_editor_that_fails_sends_nothing(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISUAL", "false")
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint, "-n", 3)
    terminal.expect("> ")
    terminal.type("/edit\n")
    terminal.expect("error: false ended with code 1; nothing was sent.")
    terminal.expect("> ")
    assert terminal.leave("\x04") == 0


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on(talk: Talk, tmp_path: Path) -> None:
    file, later = tmp_path / "chat.json", tmp_path / "later.json"
    talk("one", f"/save {file}", options=("-n", 4, "--system", "short"))
    outcome = talk(f"/load {file}", "two", f"/save {later}", f"/save {file}")
    assert f"[loaded 3 messages from {file}]" in outcome.err
    assert said(later) == ["one", "two"]
    assert saved(later)[:3] == [{"role": "system", "content": "short"}, *saved(later)[1:3]]
    assert saved(file) == saved(later)  # a file that was loaded may be saved again


def test_a_kv_cache_is_saved_with_it(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "my chat.kv"
    first = talk("one", f"/save {file} --kv", "two")
    second = talk(f"/load {file}", "two")
    assert (first.code, second.code) == (0, 0), second.err
    assert f"[loaded 2 messages from {file}]" in second.err
    assert second.out.splitlines() == first.out.splitlines()[1:]
    assert CACHED.findall(second.err) == CACHED.findall(first.err)[1:]  # as many tokens are cached
    assert int(CACHED.findall(second.err)[0][1]) > 0
    without = talk("one", f"/save {file}", "/quit")
    assert_of_last_line(without, f"{file} exists")
    contents = file.read_bytes()
    assert_of_last_line(talk(f"/load {file}", f"/save {file}"), f"{file} holds a KV cache as well; add --kv")
    assert file.read_bytes() == contents
    assert talk(f"/load {file}", f"/save --kv {file}").code == 0  # on either side of the name


def assert_of_last_line(outcome: Outcome, text: str) -> None:
    assert outcome.code == 2
    assert text in outcome.err.splitlines()[-1]


OPENAI = [
    {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"at": "Rome"}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]


@pytest.mark.parametrize("as_object", [True, False])
def test_messages_in_the_shape_of_openai(talk: Talk, tmp_path: Path, as_object: bool) -> None:
    file, later = tmp_path / "request.json", tmp_path / "later.json"
    write_json(file, {"messages": OPENAI, "temperature": 0.5} if as_object else OPENAI)
    outcome = talk(f"/load {file}", "/retry", f"/save {later}", "/undo")
    assert outcome.code == 0, outcome.err
    assert f"[loaded 4 messages from {file}]" in outcome.err
    assert saved(later)[:2] == OPENAI[:2]  # as they were
    assert [message["role"] for message in saved(later)] == ["developer", "user", "assistant"]
    assert "[forgotten; the conversation has 1 messages now]" in outcome.err


def test_a_request_with_other_settings_is_not_replaced(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    write_json(file, {"messages": OPENAI[:2], "temperature": 0.5})
    outcome = talk(f"/load {file}", f"/save {file}")
    assert "the last has no reply, /retry asks for one" in outcome.err
    assert_of_last_line(outcome, f"{file} exists")


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        ('[{"role": "pirate", "content": "x"}]', "unknown role 'pirate'"),
        ("\x00\x00\x00\x00\x00\x00\x00\x00{", "header is damaged"),
    ],
)
def test_a_file_that_is_no_conversation(talk: Talk, tmp_path: Path, contents: str, sentence: str) -> None:
    (tmp_path / "chat.json").write_text(contents)
    assert_refused(talk(f"/load {tmp_path / 'chat.json'}", "never reached"), sentence)


def test_load_without_a_file_or_of_none(talk: Talk, tmp_path: Path) -> None:
    assert "Name the file: /load FILE" in talk("/load").err
    assert "Name the file: /save FILE, or /save FILE --kv" in talk("/save --kv").err
    assert_refused(talk(f"/load {tmp_path / 'missing'}"), "missing", "No such file")


@pytest.mark.parametrize("option", ["", " --kv"])
def test_save_to_what_exists(talk: Talk, tmp_path: Path, option: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert_refused(talk(f"/save {tmp_path / 'loop'}{option}"), f"{tmp_path / 'loop'} exists; choose another name.")
    assert_refused(talk(f"/save {tmp_path}{option}"), f"{tmp_path} exists; choose another name.")


def test_a_kv_cache_without_a_conversation(cli: InProcess, talk: Talk, tiny_checkpoint: Path, tmp_path: Path) -> None:
    cli("generate", "--model", tiny_checkpoint, "-n", 1, "abc", "--save-state", tmp_path / "state.kv")
    assert_refused(talk(f"/load {tmp_path / 'state.kv'}"), "state.kv", "/save FILE --kv")


# --- reasoning ------------------------------------------------------------------------------------------------------

REPLY = ("<think>", *"Why?", "</think>", *"Yes")


@pytest.fixture(scope="module")
def reasoning_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scripted(tmp_path_factory.mktemp("reasoning") / "hf", (" ", *REPLY), CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def opened_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose chat template writes the opening tag."""
    template = CHAT_TEMPLATE.replace("assistant: ", "assistant: <think>")
    return write_scripted(tmp_path_factory.mktemp("opened") / "hf", REPLY, template)


def test_a_pipe_gets_reasoning_as_it_is(talk: Talk, reasoning_model: Path, opened_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    outcome = talk("hi", "/think", f"/save {file}", model=reasoning_model, options=())
    assert outcome.out == "<think>Why?</think>Yes\n"
    assert "\nWhy?\n" in outcome.err
    assert saved(file)[1]["content"] == "<think>Why?</think>Yes"
    outcome = talk("hi", "/think", f"/save {tmp_path / 'opened.json'}", model=opened_model, options=())
    assert outcome.out == "Why?</think>Yes\n"
    assert "\nWhy?\n" in outcome.err
    assert saved(tmp_path / "opened.json")[1]["content"] == "<think>Why?</think>Yes"  # the prompt's tag as well


def test_no_reasoning_to_show(talk: Talk, tmp_path: Path) -> None:
    assert "[the last reply has no reasoning]" in talk("/think").err
    apart = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "Hm."}]
    write_json(tmp_path / "chat.json", apart)
    assert "\nHm.\n" in talk(f"/load {tmp_path / 'chat.json'}", "/think").err


@pytest.mark.parametrize("model", ["reasoning_model", pytest.param("opened_model", marks=pytest.mark.slow)])
def test_a_terminal_folds_reasoning(
    at_terminal: Callable[..., Terminal], cli_home: Path, model: str, request: pytest.FixtureRequest
) -> None:
    terminal = at_terminal(cli_home, "chat", "--model", request.getfixturevalue(model))
    terminal.expect("> ")
    terminal.type("hi\n")
    shown = terminal.expect(r"reply \d+ tokens")
    tokens = len(REPLY) - 4 if model == "reasoning_model" else len(REPLY) - 5  # up to the last of the reasoning
    assert re.search(rf"\x1b\[2m\[reasoning of {tokens} tokens; /think shows it\]\r\n\x1b\[0mYes\r\n", shown)
    assert "Why" not in shown
    terminal.type("/think\n")
    terminal.expect(r"Why\?\r\n")
    terminal.type("/think on\n")
    terminal.expect("reasoning is shown")
    terminal.type("/retry\n")
    shown = terminal.expect(r"reply \d+ tokens")
    assert "Why?" in re.sub(r"\x1b\[[02]m", "", shown)
    assert re.search(r"\x1b\[0m\r\n\r\nYes\r\n", shown)
    terminal.type("/think off\n")
    terminal.expect("folded away")
    assert terminal.leave("/quit\n") == 0


@pytest.mark.slow
def test_a_terminal_without_colours_gets_no_escape_codes(
    at_terminal: Callable[..., Terminal], cli_home: Path, reasoning_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = at_terminal(cli_home, "chat", "--model", reasoning_model, "--quiet")
    terminal.expect("> ")
    terminal.type("hi\n")
    shown = terminal.expect("Yes\r\n")
    assert re.search(r"\[reasoning of \d+ tokens; /think shows it\]\r\nYes\r\n", shown)
    assert "\x1b[2m" not in shown
    assert terminal.leave("/quit\n") == 0
