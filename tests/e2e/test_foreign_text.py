"""Text of others, in a reply, a message or a table: it commands no terminal."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused
from tiny_models import safetensors_bytes, write_json

from numba_atomflow.cli import output
from numba_atomflow.convert import convert
from numba_atomflow.errors import SourceWarning
from numba_atomflow.files.untrusted import escape_controls

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
WILD = ("generate", "x", "-n", 120, "--temperature", 5, "--seed", 3, "--quiet")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output claims to be a terminal."""
    assert capsys
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_what_a_terminal_would_obey_is_spelt_out() -> None:
    assert escape_controls("a\x1b[31m\tb\r\n\x7f\x9b\u202eé漢😀") == "a\\x1b[31m\tb\\r\n\\x7f\\x9b\\u202eé漢😀"


def test_a_pipe_gets_a_reply_as_it_is(cli: InProcess, tiny_checkpoint: Path) -> None:
    plain = cli(*WILD, "--model", tiny_checkpoint)
    record = json.loads(cli(*WILD, "--model", tiny_checkpoint, "--json").out)
    assert plain.out.removesuffix("\n") == record["text"].removesuffix("\n")
    assert CONTROL.search(plain.out)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_gets_commands_only_if_asked_to(
    cli: InProcess, tiny_checkpoint: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*more: object) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        if command == "generate":
            return cli(*WILD, "--model", tiny_checkpoint, *more).out
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        return cli("chat", *WILD[2:], "--model", tiny_checkpoint, *more).out

    shown, raw = run(), run("--raw-output")
    assert not CONTROL.search(shown)
    assert CONTROL.search(raw)
    assert escape_controls(raw) == shown  # an escape sequence that comes in several pieces is spelt out all the same


def test_a_templates_refusal(cli: InProcess, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(
        folder / "tokenizer_config.json", config | {"chat_template": r"{{ raise_exception('\x1b]0;pwn\x07[red]') }}"}
    )
    with pytest.warns(SourceWarning, match=r"refuses this conversation: \\x1b\]0;pwn"):
        convert(folder, tmp_path / "m.safetensors")
    outcome = cli("generate", "--chat", "hi", "--model", tmp_path / "m.safetensors")
    assert_refused_visibly(outcome.err, r"refuses this conversation: \x1b]0;pwn\x07[red]")
    assert outcome.code == 2


def assert_refused_visibly(error: str, part: str) -> None:
    assert part in error
    assert not CONTROL.search(error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb\x9b", "\u202ex"])
def test_names_in_messages(cli: InProcess, tmp_path: Path, name: str) -> None:
    bad = tmp_path / f"{name}.safetensors"
    for command in (("info", bad), ("generate", "x", "--model", bad), ("convert", bad, tmp_path / "out"), (name,)):
        outcome = cli(*command)
        assert_refused(outcome)
        assert not CONTROL.search(outcome.err)
    bad.write_bytes(safetensors_bytes({name: {"dtype": "F32", "shape": [name], "data_offsets": [0, 4]}}, b"1234"))
    outcome = cli("info", bad)
    assert_refused(outcome)
    assert not CONTROL.search(outcome.err)


def test_names_in_tables(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\x1b[2J\nb.safetensors"
    odd.symlink_to(tiny_checkpoint)
    shown = cli("info", odd)
    assert (shown.code, shown.err) == (0, "")
    assert r"a\x1b[2J b.safetensors" in shown.out
    assert not CONTROL.search(shown.out)
    record = cli("info", odd, "--json").out
    assert json.loads(record)["path"] == str(odd)
    assert not CONTROL.search(record)


def test_names_in_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for bar in (output.bytes_bar(), output.steps_bar()):
        with bar as progress:
            assert progress is not None
            progress("\x1b]0;pwn\x07 [bold]\nx", 1, 2)
    shown = capsys.readouterr().err
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert r"\x1b]0;pwn\x07 [bold] x" in shown.replace("\n", " ")


def test_a_bar_that_is_shown_later(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Work that ends before leaves nothing on the screen."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for after, is_shown in ((1e9, False), (1e-9, True)):
        with output.bytes_bar(after) as progress:
            assert progress is not None
            progress("saving", 1, 2)
        assert ("saving" in capsys.readouterr().err) == is_shown


# --- variables of templates ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkative(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template refuses with what it was told."""
    folder = tmp_path_factory.mktemp("talkative") / "hf"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(
        folder / "tokenizer_config.json",
        config | {"chat_template": "{{ raise_exception([enable_thinking, tools] | tojson) }}"},
    )
    with pytest.warns(SourceWarning, match="has a chat template with which `chat` may fail"):
        return convert(folder, folder.parent / "m.safetensors")


@pytest.mark.parametrize("command", [("generate", "--chat", "hi"), ("chat",)])
def test_template_variables(cli: InProcess, talkative: Path, command: tuple[str, ...]) -> None:
    outcome = cli(
        *command, "--model", talkative, "--template-var", "enable_thinking=false", "--template-var", 'tools=[{"a": 1}]'
    )
    assert_refused(outcome, 'this conversation: [false, [{"a": 1}]]')
    assert_refused(cli(*command, "--model", talkative, "--template-var", "enable_thinking=no way"), '["no way", null]')


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["enable_thinking"], "--template-var enable_thinking has no name and value; write NAME=VALUE"),
        (["=1"], "write NAME=VALUE"),
        (["a=1", "a=2"], "gives a twice"),
        (["messages=[]"], "'messages' is reserved"),
        (["_x=1"], "'_x' has no usable name"),
        (["a=" + "[" * 100 + "]" * 100], "levels deep"),
        (["a=" + "1" * 1000], "more than 64 bits"),
    ],
)
def test_template_variables_that_cannot_be(cli: InProcess, settings: list[str], fault: str) -> None:
    options = [word for setting in settings for word in ("--template-var", setting)]
    assert_refused(cli("generate", "--chat", "hi", *options), fault)


def test_template_variables_need_a_chat(cli: InProcess) -> None:
    assert_refused(cli("generate", "hi", "--template-var", "a=1"), "--template-var", "--chat")
