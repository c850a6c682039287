"""The commands generate, convert and info, and help."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from child_processes import finish
from cli_runner import InProcess, assert_refused, command_line, environment, names_in, run_cli
from tiny_models import write_gguf, write_hf_folder, write_json

from numba_atomflow import __version__
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.engine import Engine
from numba_atomflow.sampling import SamplingParams

PARIS = "The capital of France is"


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        ([], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["validate", "--help"], 0),
        (["nope"], 2),
    ],
)
def test_answers_that_need_no_model_import_nothing_heavy(cli_home: Path, arguments: list[str], code: int) -> None:
    script = (
        "import sys; from numba_atomflow.cli import run; code = run(sys.argv[1:])\n"
        "heavy = {'numpy', 'numba', 'tokenizers', 'jinja2', 'gguf', 'rich'} & set(sys.modules)\n"
        "print(code, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment(cli_home),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == f"{code} []"


COMMANDS = (
    *("generate", "chat", "convert", "quantize", "perplexity", "info", "ground-truth", "validate", "bench", "profile"),
    *("serve", "batch run", "batch perplexity", "batch validate", "sandbox run", "sandbox compare"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_teaches_by_example(cli: InProcess, command: str) -> None:
    outcome = cli(*command.split(), "--help")
    assert outcome.code == 0
    assert len(re.findall(rf"^ *(?:.*\| )?numba-atomflow {command}\b", outcome.out, re.MULTILINE)) >= 2


SAME_EVERYWHERE = ("--backend", "--decode", "--threads", "--private-copy", "--max-seq-len", "--max-tokens", "--seed")
# Options of a group that are something else there: of a whole workload; of each process.
GROUPS = {"sandbox": {"--max-tokens", "--seed"}, "batch": {"--threads"}}


def test_an_option_is_the_same_in_every_command() -> None:
    """Its value's name, its default and its help; and there is one default model."""
    import typer

    from numba_atomflow.cli.app import app

    group: Any = typer.main.get_command(app)
    commands = {name: command for name, command in group.commands.items() if name not in GROUPS}
    for one in GROUPS:
        commands |= {f"{one} {name}": command for name, command in group.commands[one].commands.items()}
    assert set(commands) == set(COMMANDS)
    for option in SAME_EVERYWHERE:
        found = {
            (parameter.metavar, parameter.default, parameter.help)
            for name, command in commands.items()
            for parameter in command.params
            if option in parameter.opts and option not in GROUPS.get(name.split()[0], ())
        }
        assert len(found) == 1, (option, found)
    for name, command in commands.items():
        for parameter in command.params:
            if parameter.name == "model" and name != "info":
                shown = f"{parameter.default} {parameter.help}"
                assert DEFAULT_MODEL in shown, name
        assert name == "serve" or any("--json" in parameter.opts for parameter in command.params), name


def test_version(cli: InProcess) -> None:
    assert cli("--version").out == f"numba-atomflow {__version__}\n"


# --- generate -------------------------------------------------------------------------------------------------------


def test_the_default_model_knows_the_capital_of_france(smollm2_home: Path) -> None:
    outcome = run_cli(smollm2_home, "generate", PARIS, "--max-tokens", "12")
    assert outcome.code == 0
    assert "Paris" in outcome.out
    assert outcome.out.endswith("\n")
    for line in (
        r"backend  cpu \(.*\d threads\), loaded in \d+\.\d\d s",
        r"prompt   5 tokens, TTFT \d+\.\d+ s",
        r"decode   12 tokens, \d+\.\d tok/s, TPOT \d+\.\d ms, \d+\.\d\d GB/s of weights",
        r"finish   max_tokens",
    ):
        assert re.search(f"^{line}$", outcome.err, re.MULTILINE), outcome.err


def test_a_seed_gives_the_same_text_in_another_process(
    cli: InProcess, smollm2_home: Path, smollm2_checkpoint: Path
) -> None:
    sampled = ["generate", PARIS, "--temperature", "1.5", "--max-tokens", "12", "--quiet"]
    first = run_cli(smollm2_home, *sampled, "--seed", "7")
    assert (first.code, first.err) == (0, "")
    assert cli(*sampled, "--seed", "7", "--model", smollm2_checkpoint).out == first.out
    assert cli(*sampled, "--seed", "8", "--model", smollm2_checkpoint).out != first.out


def test_json_is_the_only_standard_output(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("generate", "abc", "--model", tiny_checkpoint, "-n", 6, "--seed", 3, "-t", 0.5, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    record = json.loads(outcome.out)
    assert " ".join(record) == "text token_ids finish_reason stats model sampling backend versions"
    assert record["finish_reason"] == "max_tokens"
    assert len(record["token_ids"]) == record["stats"]["tokens"] == 6
    assert record["stats"]["prompt_tokens"] == 3
    assert record["stats"]["ttft_seconds"] > 0
    assert record["stats"]["tokens_per_second"] * record["stats"]["tpot_seconds"] == pytest.approx(1.0)
    assert record["model"]["path"] == str(tiny_checkpoint)
    assert record["sampling"] | {"seed": 3, "temperature": 0.5} == record["sampling"]
    assert record["backend"]["name"] == "cpu"
    assert record["versions"]["numba-atomflow"] == __version__
    with Engine.load(tiny_checkpoint) as engine:
        reply = engine.generate("abc", SamplingParams(max_tokens=6, seed=3, temperature=0.5)).finish()
        assert record["token_ids"] == reply.token_ids
        assert record["stats"]["weight_bytes_per_token"] == engine.weight_bytes_per_token


def test_logprobs_are_shown_and_in_the_json(cli: InProcess, tiny_checkpoint: Path) -> None:
    command = ["generate", "abc", "--model", tiny_checkpoint, "-n", 4, "--quiet", "--logprobs", 2]
    record = json.loads(cli(*command, "--json", "--prompt-logprobs", 1).out)
    assert [entry["token"] for entry in record["logprobs"]] == record["token_ids"]
    first = record["logprobs"][0]
    assert first["rank"] == 1
    assert first["top"][0] == {name: first[name] for name in ("token", "text", "logprob")}
    assert record["prompt_logprobs"][0] is None
    assert [entry["text"] for entry in record["prompt_logprobs"][1:]] == ["b", "c"]
    rows = cli(*command).out.splitlines()[-4:]
    shown = [float(re.findall(r"-?\d+\.\d{4}", row)[0]) for row in rows]
    assert shown == pytest.approx([entry["logprob"] for entry in record["logprobs"]], abs=1e-4)
    assert cli(*command[:-1], 21).code == 2


def test_every_sampling_option_is_passed_on(cli: InProcess, tiny_checkpoint: Path) -> None:
    given = {"temperature": 0.5, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 11}
    given["max_tokens"] = 2
    arguments = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    more = ["--stop", "one", "--stop", "two", "--ignore-eos"]
    outcome = cli("generate", "abc", "--model", tiny_checkpoint, "--json", *arguments, *more)
    assert json.loads(outcome.out)["sampling"] == {
        **given,
        "stop": ["one", "two"],
        "ignore_eos": True,
        "speculate": "auto",
    }


def test_a_prompt_comes_from_an_argument_a_file_or_standard_input(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tail = ("--model", tiny_checkpoint, "--json", "-n", 4)
    prompt = "naïve 🦊\n"  # only the newline that ends the file is taken off
    file = tmp_path / "prompt.txt"
    file.write_text(prompt + "\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((prompt + "\n").encode())))
    records = [
        json.loads(cli("generate", *where, *tail).out) for where in ((prompt,), ("--file", file), ("-",), ("naïve 🦊",))
    ]
    tokens = [record["stats"]["prompt_tokens"] for record in records]
    assert tokens == [12, 12, 12, 11]
    assert records[0]["token_ids"] == records[1]["token_ids"] == records[2]["token_ids"]


def test_chat_wraps_the_prompt_in_the_template(cli: InProcess, tiny_checkpoint: Path) -> None:
    tail = ("abc", "--model", tiny_checkpoint, "--json", "-n", 1)
    raw, chat = (
        json.loads(cli("generate", *how, *tail).out)["stats"]["prompt_tokens"] for how in (["--raw"], ["--chat"])
    )
    assert (raw, chat) == (len("abc"), len("user: abc\nassistant: "))


def test_text_is_written_as_it_is_generated(smollm2_home: Path) -> None:
    """The first words arrive long before the last; Ctrl-C then ends the program without a traceback."""
    command = command_line("generate", "Once upon a time", "-n", 2000, "--ignore-eos")
    with subprocess.Popen(
        command, env=environment(smollm2_home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.read(10).strip()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = finish(process)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert err == ""


def test_a_broken_pipe_is_no_error(cli_home: Path, tiny_checkpoint: Path) -> None:
    command = command_line("generate", "abc", "--model", tiny_checkpoint, "-n", 500, "--ignore-eos")
    with subprocess.Popen(
        command, env=environment(cli_home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_an_ascii_terminal_gets_question_marks(cli_home: Path, smollm2_home: Path) -> None:
    outcome = run_cli(smollm2_home, "generate", "日本の首都は、", "-n", 8, "--quiet", env={"PYTHONIOENCODING": "ascii"})
    assert (outcome.code, outcome.err) == (0, "")
    assert "?" in outcome.out


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_convert(cli: InProcess, tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    source = tiny_folder
    if kind == "gguf":
        source = tmp_path / "tiny.gguf"
        write_gguf(source, tokenizer=True)
    destination = tmp_path / "new" / "tiny.safetensors"
    outcome = cli("convert", source, destination)
    assert (outcome.code, outcome.err) == (0, "")
    with Checkpoint.open(destination) as checkpoint:
        parameters = checkpoint.geometry.parameter_count()
        checkpoint.verify()
    assert outcome.out.startswith(f"{destination}: {parameters:,} parameters in ")
    assert names_in(destination.parent) == ["tiny.safetensors"]

    again = cli("convert", source, destination, "--overwrite", "--json")
    record = json.loads(again.out)
    assert again.err == ""
    assert record == {
        "path": str(destination),
        "bytes": destination.stat().st_size,
        "parameters": parameters,
        "seconds": record["seconds"],
    }


@pytest.mark.parametrize("command", [("convert",), ("quantize", "--method", "rtn")])
def test_warnings_of_a_source_are_lines_of_standard_error(
    cli: InProcess, tmp_path: Path, command: tuple[str, ...]
) -> None:
    write_hf_folder(tmp_path / "hf")
    write_json(tmp_path / "hf" / "generation_config.json", {"eos_token_id": [-1, 400]})
    outcome = cli(*command, tmp_path / "hf", tmp_path / "out.safetensors")
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert [line.partition(" has the ")[2] for line in lines] == [
        f"eos_token_id {outside}, outside its vocabulary of 288 tokens; it is ignored." for outside in (-1, 400)
    ]
    assert all(line.startswith("warning: ") for line in lines)


def test_progress_is_shown_to_people_only(cli_home: Path, tiny_folder: Path, tmp_path: Path) -> None:
    piped = run_cli(cli_home, "convert", tiny_folder, tmp_path / "a.safetensors")
    assert piped.err == ""

    master, slave = pty.openpty()
    done = subprocess.run(
        command_line("convert", tiny_folder, tmp_path / "b.safetensors"),
        env=environment(cli_home, TERM="xterm", COLUMNS="120"),
        stdout=subprocess.PIPE,
        stderr=slave,
        check=True,
    )
    os.close(slave)
    shown = ""
    with suppress(OSError):  # the end of what a terminal's other side has written
        while part := os.read(master, 1 << 16):
            shown += part.decode(errors="replace")
    os.close(master)
    assert "verifying" in shown
    assert re.search(r"\d/\d.* [kM]B", shown), shown
    assert done.stdout.decode().startswith(f"{tmp_path / 'b.safetensors'}: ")


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_of_a_checkpoint(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("info", tiny_checkpoint, "--max-seq-len", 100, "--verify")
    assert (outcome.code, outcome.err) == (0, "")
    for line in (
        rf"checkpoint +{re.escape(str(tiny_checkpoint))}",
        r"verified +every weight was read and is sound",
        r"heads +4 of 64, 2 for keys and values",
        r"positions +at most 512",
        r"source +hf \(hf\)",
        r"  SHA-256 +[0-9a-f]{64}  model\.safetensors",
        r"memory plan +cpu backend, 100 positions .*",
        r"  kv cache +0\.2 MB",
    ):
        assert re.search(f"^{line}$", outcome.out, re.MULTILINE), outcome.out


def test_info_as_json_adds_up(cli: InProcess, tiny_checkpoint: Path) -> None:
    record = json.loads(cli("info", tiny_checkpoint, "--max-seq-len", 100, "--json").out)
    with Engine.load(tiny_checkpoint, max_seq_len=100) as engine:
        assert record["geometry"] == json.loads(json.dumps(engine.geometry.to_dict()))
        assert record["parameters"] == engine.geometry.parameter_count()
        assert record["memory_plan"]["allocated_total"] == engine.backend.plan.total
        assert record["memory_plan"]["mapped_bytes"]["weights"] == engine.checkpoint.payload_bytes
    pools = record["memory_plan"]["allocated_bytes"]
    assert pools["kv cache"] == 2 * 2 * 100 * 128 * 4  # layers, keys and values, positions, width, float32
    for pool, count in pools.items():
        assert count == sum(b["bytes"] for b in record["memory_plan"]["buffers"] if b["pool"] == pool)
    assert record["verified"] is False


def test_a_name_means_the_models_folder_even_beside_a_folder_of_that_name(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_ATOMFLOW_HOME", str(tmp_path / "home"))
    named = tmp_path / "home" / "models" / f"{DEFAULT_MODEL}.safetensors"
    named.parent.mkdir(parents=True)
    named.symlink_to(tiny_checkpoint)
    (tmp_path / DEFAULT_MODEL).mkdir()
    (tmp_path / "here.safetensors").symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert json.loads(cli("info", DEFAULT_MODEL, "--json").out)["path"] == str(named)
    assert json.loads(cli("info", "here.safetensors", "--json").out)["path"] == "here.safetensors"
    assert cli("generate", "x", "-n", 1).code == 0
    assert_refused(cli("info", f"./{DEFAULT_MODEL}"), "is a folder")


def test_info_of_the_machine(cli: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ATOMFLOW_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.safetensors").touch()
    record = json.loads(cli("info", "--json").out)
    assert record["versions"]["numba-atomflow"] == __version__
    assert record["home"] == str(tmp_path)
    assert record["models"] == ["mine"]
    assert "workqueue" in record["threading_layers"]  # it is part of numba
    assert record["threads"] >= 1
    assert record["cuda_driver"] is None or re.fullmatch(r"\d+\.\d", record["cuda_driver"])
    table = cli("info").out
    assert re.search(rf"^home +{re.escape(str(tmp_path))}$", table, re.MULTILINE)
