"""The conversation: through a pipe, and at a terminal, where Ctrl-C stops a reply and not the session."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from child_processes import finish, wait
from cli_runner import InProcess, assert_refused, command_line, environment, run_cli
from terminals import Terminal

CACHED = re.compile(r"prompt (\d+) tokens, (\d+) of them cached; reply (\d+) tokens")


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Put lines into standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


# --- through a pipe -------------------------------------------------------------------------------------------------


def test_two_turns_share_the_kv_cache(smollm2_home: Path) -> None:
    outcome = run_cli(
        smollm2_home,
        *("chat", "--max-tokens", "40", "--system", "Answer in one sentence."),
        stdin="What is the capital of France?\n\nWhat did I ask you about?\n",
    )
    assert outcome.code == 0
    assert "Paris" in outcome.out
    assert ">" not in outcome.out
    (first, no_cache, reply), (second, from_cache, _) = (map(int, turn) for turn in CACHED.findall(outcome.err))
    assert no_cache == 0
    # All of the first turn is still there: its prompt, and its reply up to the token that ended it.
    assert from_cache >= first + reply - 1
    assert second > from_cache


def test_quiet_prints_only_replies(cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "hi")
    noisy = cli("chat", "--model", tiny_checkpoint, "-n", 200, "--stop", "e")
    say(monkeypatch, "hi")
    quiet = cli("chat", "--model", tiny_checkpoint, "-n", 200, "--stop", "e", "--quiet")
    assert CACHED.search(noisy.err)
    assert quiet.out == noisy.out
    assert not CACHED.search(quiet.err)


def test_commands(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    say(
        monkeypatch,
        *("/help", "one", "two", f"/save {first}", f"/save {first}", "/reset", "three", f"/save  {second}"),
        *("/save", "/quit", "after the end"),
    )
    outcome = cli("chat", "--model", tiny_checkpoint, "-n", 5, "--system", "short")
    assert outcome.code == 0
    saved = json.loads(first.read_text())
    assert saved["model"] == str(tiny_checkpoint)
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in saved["messages"]][:2] == ["short", "one"]
    assert json.loads(second.read_text())["messages"][:2] == [
        {"role": "system", "content": "short"},
        {"role": "user", "content": "three"},
    ]
    turns = [tuple(map(int, turn)) for turn in CACHED.findall(outcome.err)]
    assert len(turns) == 3  # nothing after /quit
    assert turns[1][1] > 0
    assert turns[2][1] == 0  # /reset empties the KV cache
    for talk in ("/save chat.json     write", "Name the file", f"saved to {second}"):
        assert talk in outcome.err


def test_a_piped_line_that_only_looks_like_a_command_is_a_message(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved.json"
    lines = ["/usr/bin is what?", "// a comment", "/reset later"]
    say(monkeypatch, *lines, f"/save {saved}")
    outcome = cli("chat", "--model", tiny_checkpoint, "-n", 3)
    assert outcome.code == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == lines


def test_json_is_one_line_for_every_reply(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "one", "", "two")
    plain = cli("chat", "--model", tiny_checkpoint, "-n", 5, "--quiet")
    say(monkeypatch, "one", "", "two")
    outcome = cli("chat", "--model", tiny_checkpoint, "-n", 5, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    first, second = (json.loads(line) for line in outcome.out.splitlines())
    assert [" ".join(record) for record in (first, second)] == ["text finish_reason stats"] * 2
    assert plain.out == "".join(f"{record['text'].removesuffix(chr(10))}\n" for record in (first, second))
    assert first["finish_reason"] == "max_tokens"
    assert first["stats"]["tokens"] == second["stats"]["tokens"] == 5
    assert first["stats"]["reused_tokens"] == 0 < second["stats"]["reused_tokens"] < second["stats"]["prompt_tokens"]
    assert second["stats"]["tokens_per_second"] > 0


def test_save_does_not_replace_a_file_of_others(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious.json"
    precious.write_text("precious")
    say(monkeypatch, f"/save {precious}")
    assert_refused(cli("chat", "--model", tiny_checkpoint), precious)
    assert precious.read_text() == "precious"
    say(monkeypatch, f"/save {tmp_path / 'nowhere' / 'x.json'}")
    assert_refused(cli("chat", "--model", tiny_checkpoint), "nowhere")
    say(monkeypatch, "/save a\0b")
    assert_refused(cli("chat", "--model", tiny_checkpoint), r"FILE is 'a\x00b'")


def test_a_conversation_that_no_longer_fits(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(monkeypatch, "a" * 60, "b" * 60, "never reached")
    outcome = cli("chat", "--model", tiny_checkpoint, "--max-seq-len", 120, "-n", 10)
    assert outcome.code == 2
    error = outcome.err.splitlines()[-1]
    assert error.startswith("error: The conversation no longer fits the context of 120 tokens")
    assert "/reset" in error
    assert len(CACHED.findall(outcome.err)) == 1


def test_a_reply_that_fills_the_context(cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, "a" * 60)
    outcome = cli("chat", "--model", tiny_checkpoint, "--max-seq-len", 100)
    assert outcome.code == 0
    assert "[the context is full; /reset starts a new conversation]" in outcome.err


def test_input_that_is_not_utf8(cli_home: Path, tiny_checkpoint: Path) -> None:
    done = subprocess.run(
        command_line("chat", "--model", tiny_checkpoint, "-n", 3, "--quiet"),
        input=b"caf\xe9\n",
        env=environment(cli_home, PYTHONUTF8="0", PYTHONIOENCODING="utf-8:strict"),
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: Standard input is not UTF-8")
    assert done.stderr.count(b"\n") == 1


# --- at a terminal --------------------------------------------------------------------------------------------------


@pytest.fixture
def history(smollm2_home: Path) -> Path:
    """Where a chat in the default model's home keeps its history: nowhere yet."""
    file = smollm2_home / "chat_history"
    file.unlink(missing_ok=True)
    return file


def test_ctrl_c_stops_a_reply_and_keeps_the_session(
    at_terminal: Callable[..., Terminal], smollm2_home: Path, history: Path
) -> None:
    terminal = at_terminal(smollm2_home, "chat", "--max-tokens", 1000)
    terminal.expect("> ")
    terminal.type("Write a very long story about a fox and a bear.\n")
    terminal.expect(r"(fox|bear)\.\r\n")  # the line as it was typed
    reply = terminal.expect(r"(\w+\W+){8}")
    terminal.type("\x03")
    stopped = terminal.expect(r"\[stopped\]")
    assert "Traceback" not in stopped
    first, _, tokens = map(int, CACHED.search(terminal.expect(r"reply \d+ tokens")).groups())  # type: ignore[union-attr]
    terminal.expect("> ")

    terminal.type("What is the capital of France?\n")
    answer = terminal.expect(r"reply \d+ tokens")
    assert "Paris" in answer
    second, from_cache, _ = map(int, CACHED.search(answer).groups())  # type: ignore[union-attr]
    # The interrupted text is in the conversation and in the KV cache; at its end, tokens may be merged differently.
    assert first + tokens - 5 <= from_cache < second
    terminal.expect("> ")

    saved = smollm2_home / "story.json"
    terminal.type(f"/save {saved}\n")
    terminal.expect("saved to")
    terminal.expect("> ")
    assert terminal.leave("\x04") == 0  # Ctrl-D
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant"] * 2
    story = json.loads(saved.read_text())["messages"][1]["content"]
    assert story.split()[:5] == reply.split()[:5]
    assert history.read_text().splitlines()[0].startswith("Write a very long story")


def test_ctrl_c_twice_at_the_prompt_leaves(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path
) -> None:
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint)
    assert "/help lists the commands" in terminal.expect("> ")
    terminal.press_ctrl_c_until("Ctrl-C again leaves, and so does Ctrl-D")
    assert terminal.press_ctrl_c_until_it_leaves() == 0


def test_json_is_not_for_a_terminal(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path
) -> None:
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint, "--json")
    terminal.expect("error: --json is for a conversation through a pipe")
    assert wait(terminal.process) == 2


def test_two_slashes_say_one_at_a_terminal(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint, "-n", 3)
    terminal.expect("> ")
    terminal.type("//etc is a folder\n")
    terminal.expect(r"reply \d+ tokens")
    terminal.type(f"/save {tmp_path / 'saved.json'}\n")
    terminal.expect("saved to")
    assert terminal.leave("/quit\n") == 0
    assert json.loads((tmp_path / "saved.json").read_text())["messages"][0]["content"] == "/etc is a folder"


def test_history_is_kept_between_sessions(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path
) -> None:
    first = at_terminal(cli_home, "chat", "--model", tiny_checkpoint)
    first.expect("> ")
    first.type("/nonsense-of-the-first-session\n")
    first.expect("no command")
    first.expect("> ")
    assert first.leave("/quit\n") == 0
    second = at_terminal(cli_home, "chat", "--model", tiny_checkpoint)
    second.expect("> ")
    second.type("\x1b[A\x1b[A\n")  # twice up: over /quit
    second.expect("no command /nonsense-of-the-first-session")
    second.expect("> ")
    assert second.leave("\x04") == 0


def test_a_full_context_at_a_terminal_leaves_a_way_on(
    at_terminal: Callable[..., Terminal], cli_home: Path, tiny_checkpoint: Path
) -> None:
    terminal = at_terminal(cli_home, "chat", "--model", tiny_checkpoint, "--max-seq-len", 100, "-n", 5)
    terminal.expect("> ")
    terminal.type("a" * 120 + "\n")
    error = terminal.expect(r"error: [^\n]*\n")
    assert "no longer fits the context of 100 tokens" in error
    terminal.expect("> ")
    terminal.type("/reset\n")
    terminal.expect("new conversation")
    terminal.type("short\n")
    terminal.expect(r"reply 5 tokens")
    terminal.expect("> ")
    assert terminal.leave("\x04") == 0


def test_ctrl_c_ends_a_piped_conversation(smollm2_home: Path) -> None:
    with subprocess.Popen(
        command_line("chat", "--max-tokens", 1000),
        env=environment(smollm2_home),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write("Write a very long story.\nAnd another one.\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, err = finish(process)
    assert process.returncode == 130
    assert "Traceback" not in err
