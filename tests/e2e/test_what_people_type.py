"""Arguments, file names and locales of all kinds: they work, or are refused in a sentence that is true."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import run
from cli_runner import InProcess, assert_refused, command_line, environment, run_cli

from numba_atomflow.home import ENVIRONMENT_VARIABLE

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
TEXT = "Grüße aus Köln. 你好"


def test_a_prompt_in_the_c_locale(cli: InProcess, cli_home: Path, tiny_checkpoint: Path) -> None:
    ours = [TEXT, "--model", tiny_checkpoint, "-n", 4, "--threads", 1]
    expected = json.loads(cli("generate", *ours, "--json").out)
    got = run_cli(cli_home, "generate", *ours, "--json", env=C_LOCALE)
    assert json.loads(got.out)["token_ids"] == expected["token_ids"]
    assert json.loads(got.out)["stats"]["prompt_tokens"] == expected["stats"]["prompt_tokens"]


def test_chat_and_what_it_writes_in_the_c_locale(cli_home: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    chat = ["chat", "--model", tiny_checkpoint, "-n", 8, "--threads", 1, "--quiet"]
    saved = tmp_path / "Grüße"
    given = f"\ufeff{TEXT}\n{TEXT}\n/save {saved}\n"
    in_c = run_cli(cli_home, *chat, stdin=given, env=C_LOCALE)
    assert in_c.code == 0
    record = saved.read_text(encoding="utf-8")
    saved.unlink()
    plain = run_cli(cli_home, *chat, stdin=given.removeprefix("\ufeff"))
    assert (plain.code, plain.out, saved.read_text(encoding="utf-8")) == (0, in_c.out, record)


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are bytes on POSIX systems")
def test_bytes_that_are_no_text(cli_home: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/n\xfc.txt"
    Path(os.fsdecode(name)).write_text(TEXT, encoding="utf-8")

    def run_bytes(*arguments: bytes) -> subprocess.CompletedProcess[bytes]:
        common = [os.fsencode(part) for part in command_line("generate", "--model", tiny_checkpoint, "-q", "-n", 1)]
        more = environment(cli_home)
        return run([*common, *arguments], env=more)

    assert run_bytes(b"--file", name).returncode == 0
    done = run_bytes(b"--chat", b"--template-var", b"name=\xfc", b"Hi")
    assert done.stderr == b"error: --template-var is not UTF-8 text (byte 5); give it in UTF-8.\n"
    done = run_bytes(b"Gr\xfc")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: The prompt is not UTF-8 text (byte 2); give it in UTF-8.\n"


@pytest.mark.parametrize("prompt", ["- buy milk", "-5", "-nice weather", "-hello", "--- a/file", "-", "—"])
def test_a_prompt_that_begins_with_a_dash(cli: InProcess, tiny_checkpoint: Path, prompt: str) -> None:
    words = ["--model", tiny_checkpoint, "-n", 1, "-q", "--threads", 1]
    if prompt not in {"-", "—"}:  # standard input, and no dash of an option
        assert_refused(cli("generate", *words, prompt), " -- ")
        assert cli("generate", *words, "--", prompt).code == 0
    help_text = " ".join(cli("generate", "--help").out.split())
    assert "after -- if it begins with a dash" in help_text


def test_advice_about_dashes_is_given_where_it_may_help(cli: InProcess) -> None:
    assert " -- " not in cli("generate", "text", "--bogus").err
    assert " -- " not in cli("generate", "text", "--max-tokens", "many").err


PATHS = [
    ["generate", "--model", "m", "--file=~"],
    ["bench", "m", "--no-compile-times", "--compare=~"],
    ["validate", "m", "--ground-truth=~"],
    ["sandbox", "run", "m", "--trace=~"],
    ["perplexity", "m", "--text=~"],
]


@pytest.mark.parametrize("command", PATHS, ids=lambda command: command[0])
def test_a_tilde_is_expanded_by_every_command(
    cli: InProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path, command: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.safetensors").symlink_to(tiny_checkpoint)
    *words, option = command
    assert_refused(cli(*words, option + "/none.json"), tmp_path / "here" / "none.json")
    assert_refused(cli(*words, option + "draft.json"), "~draft.json")


def test_a_file_whose_name_begins_with_a_tilde(
    cli: InProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("convert", tiny_folder, "~draft.safetensors").code == 0
    (tmp_path / "~draft.txt").write_text("Hello", encoding="utf-8")
    done = cli("generate", "--file=~draft.txt", "--model=~draft.safetensors", "-n", 1, "-q", "--threads", 1)
    assert done.code == 0, done.err


def test_the_package_runs_as_a_module(cli_home: Path) -> None:
    def run_module(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "numba_atomflow", *arguments]
        more = environment(cli_home, COLUMNS="80")
        done = run(command, env=more, text=True)
        return done.returncode, done.stdout, done.stderr

    code, out, err = run_module("generate", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: numba-atomflow generate [OPTIONS]")
    assert run_module("--bogus") == (2, "", "error: No such option: --bogus; see `numba-atomflow --help`.\n")
