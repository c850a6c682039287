"""Invalid input: exit code 2, one sentence that names the cause, and no files left."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_processes import Watchdog, finish
from cli_runner import InProcess, assert_refused, command_line, environment, names_in, run_cli
from tiny_models import (
    Weights,
    hf_config,
    random_weights,
    safetensors_bytes,
    tiny_geometry,
    write_gguf,
    write_hf_folder,
    write_json,
)

import numba_atomflow.engine
from numba_atomflow.checkpoint.format import Checkpoint


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    """Where a conversion should go: into a folder of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "model.safetensors"


# --- sources --------------------------------------------------------------------------------------------------------


def test_missing_paths(cli: InProcess, tmp_path: Path, destination: Path) -> None:
    missing = tmp_path / "nowhere" / "model.gguf"
    assert_refused(cli("convert", missing, destination), missing)
    assert_refused(cli("generate", "x", "--model", missing), missing)
    assert_refused(cli("chat", "--model", missing), missing)
    assert_refused(cli("info", missing), missing)
    assert_refused(cli("generate", "--file", missing), missing, "--file")
    assert names_in(destination.parent) == []


def test_folder_without_weights(cli: InProcess, tmp_path: Path, destination: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(cli("convert", folder, destination), folder, "config.json")
    write_json(folder / "config.json", hf_config(tiny_geometry()))
    assert_refused(cli("convert", folder, destination), folder, "holds no weights")
    assert names_in(destination.parent) == []


@pytest.mark.parametrize("left", [3, 20, 2_000, 100_000, -1])
def test_truncated_gguf(cli: InProcess, tmp_path: Path, destination: Path, left: int) -> None:
    source = tmp_path / "model.gguf"
    write_gguf(source, tokenizer=True)
    source.write_bytes(source.read_bytes()[:left])
    assert_refused(cli("convert", source, destination), source)
    assert names_in(destination.parent) == []


@pytest.mark.parametrize("left", [0, 5, 200, 100_000, -1])
def test_truncated_safetensors(
    cli: InProcess, tiny_folder: Path, tiny_checkpoint: Path, tmp_path: Path, destination: Path, left: int
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert_refused(cli("convert", folder, destination), weights)

    checkpoint = tmp_path / "cut.safetensors"
    checkpoint.write_bytes(tiny_checkpoint.read_bytes()[:left])
    assert_refused(cli("generate", "x", "--model", checkpoint), checkpoint)
    assert_refused(cli("info", checkpoint), checkpoint)
    assert names_in(destination.parent) == []


def test_wrong_magic(cli: InProcess, tmp_path: Path, destination: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 this is something else, and long enough to be read")
    assert_refused(cli("convert", file, destination), file, "not a GGUF file")
    assert_refused(cli("generate", "x", "--model", file), file, "not a safetensors file")
    assert names_in(destination.parent) == []


def test_unknown_architecture(cli: InProcess, tmp_path: Path, destination: Path) -> None:
    folder = tmp_path / "folder"
    write_hf_folder(folder)
    write_json(folder / "config.json", hf_config(tiny_geometry()) | {"model_type": "mamba"})
    assert_refused(cli("convert", folder, destination), folder / "config.json", "mamba")
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf, architecture="mamba")
    assert_refused(cli("convert", gguf, destination), gguf, "mamba")
    assert names_in(destination.parent) == []


DOWN = "model.layers.1.mlp.down_proj.weight"


def _without(weights: Weights) -> None:
    del weights[DOWN]


def _with_one_more(weights: Weights) -> None:
    weights["model.layers.1.mlp.gate.bias"] = np.zeros(8, np.float32)


def _misshapen(weights: Weights) -> None:
    weights[DOWN] = weights[DOWN][:, :-1].copy()


def _with_nan(weights: Weights) -> None:
    weights[DOWN][5, 7] = np.nan


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [(_without, DOWN), (_with_one_more, "model.layers.1.mlp.gate.bias"), (_misshapen, DOWN), (_with_nan, DOWN)],
)
def test_damaged_weights(
    cli: InProcess, tmp_path: Path, destination: Path, damage: Callable[[Weights], None], culprit: str
) -> None:
    weights = random_weights(tiny_geometry())
    damage(weights)
    folder = tmp_path / "folder"
    write_hf_folder(folder, weights=weights)
    assert_refused(cli("convert", folder, destination), folder, culprit)
    assert names_in(destination.parent) == []


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"tie_word_embeddings": True}, "lm_head.weight"),
        ({"head_dim": 63}, "63"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_config_that_does_not_fit_the_weights(
    cli: InProcess, tmp_path: Path, destination: Path, change: dict[str, Any], culprit: str
) -> None:
    folder = tmp_path / "folder"
    write_hf_folder(folder)
    write_json(folder / "config.json", hf_config(tiny_geometry()) | change)
    assert_refused(cli("convert", folder, destination), folder, culprit)
    assert names_in(destination.parent) == []


# --- checkpoints ----------------------------------------------------------------------------------------------------


def rewrite(checkpoint: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The checkpoint with another header over the same data."""
    data = checkpoint.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * ((end - 8 - len(text)) % 128)  # the data stay aligned
    target.write_bytes(safetensors_bytes(text, data[end:]))
    return target


def test_checkpoint_without_a_tensor_and_with_one_more(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def rename(header: dict[str, Any]) -> None:
        header["surprise"] = header.pop("final_norm")

    def add(header: dict[str, Any]) -> None:
        end = max(record["data_offsets"][1] for name, record in header.items() if name != "__metadata__")
        header["surprise"] = {"dtype": "U8", "shape": [0], "data_offsets": [end, end]}

    bad = rewrite(tiny_checkpoint, tmp_path / "bad.safetensors", rename)
    assert_refused(cli("generate", "x", "--model", bad), bad, "final_norm")
    bad = rewrite(tiny_checkpoint, tmp_path / "bad.safetensors", add)
    assert_refused(cli("generate", "x", "--model", bad), bad, "surprise")


def test_checkpoint_with_a_wrong_shape(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def transpose(header: dict[str, Any]) -> None:
        header["layer.0.qkv.weight"]["shape"].reverse()

    bad = rewrite(tiny_checkpoint, tmp_path / "bad.safetensors", transpose)
    assert_refused(cli("info", bad), bad, "layer.0.qkv.weight")


def test_checkpoint_of_another_version(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def age(header: dict[str, Any]) -> None:
        header["__metadata__"]["format_version"] = "99"

    bad = rewrite(tiny_checkpoint, tmp_path / "bad.safetensors", age)
    assert_refused(cli("generate", "x", "--model", bad), bad, "version 99")


@pytest.mark.parametrize(("tensor", "byte"), [("layer.1.down.weight", 0x7F), ("layer.0.qkv.scale", 0xFF)])
def test_verify_finds_a_flipped_byte(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, tensor: str, byte: int
) -> None:
    bad = tmp_path / "bad.safetensors"
    data = bytearray(tiny_checkpoint.read_bytes())
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        wanted = checkpoint.array(tensor).tobytes()
    at = data.index(wanted)
    data[at : at + 4] = bytes([byte] * 4)
    bad.write_bytes(data)
    assert_refused(cli("info", bad, "--verify"), bad, tensor)
    assert cli("info", tiny_checkpoint, "--verify").code == 0


def test_a_source_where_a_checkpoint_is_expected(cli: InProcess, tiny_folder: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    write_gguf(gguf)
    for command in (("generate", "x", "--model"), ("chat", "--model"), ("info",)):
        for source in (gguf, tiny_folder, tiny_folder / "model.safetensors"):
            assert_refused(cli(*command, source), source, "convert")


def test_unknown_model_name(cli: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ATOMFLOW_HOME", str(tmp_path))
    assert_refused(cli("generate", "x", "--model", "no-such-model"), "no-such-model", "none yet")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.safetensors").touch()
    assert_refused(cli("generate", "x", "--model", "no-such-model"), "no-such-model", "mine")
    assert_refused(cli("generate", "x", "--model", "mine-1.7b"), "mine-1.7b", "there: mine)")
    assert_refused(cli("info", "n" * 300), "n" * 300, "there: mine)")
    assert_refused(cli("info", tmp_path / ("n" * 300)), "n" * 300)


def test_user_that_does_not_exist(cli: InProcess, tmp_path: Path) -> None:
    assert_refused(cli("info", "~nosuchuser/x"), "~nosuchuser/x")
    assert_refused(cli("convert", "~nosuchuser/x", tmp_path / "y"), "~nosuchuser/x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_where_a_checkpoint_is_expected(cli_home: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert_refused(run_cli(cli_home, "info", pipe), pipe, "not a regular file")


def test_base_model_without_a_chat_template(cli: InProcess, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_hf_folder(folder)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|eos|>"})
    base = tmp_path / "base.safetensors"
    assert cli("convert", folder, base).code == 0
    assert_refused(cli("chat", "--model", base), "no chat template")
    assert_refused(cli("generate", "x", "--chat", "--model", base), "no chat template")
    assert cli("generate", "x", "--model", base, "-n", 1).code == 0


# --- prompts and options --------------------------------------------------------------------------------------------


def test_prompt_longer_than_the_context(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("generate", "x" * 101, "--model", tiny_checkpoint, "--max-seq-len", 100)
    assert_refused(outcome, "101 tokens", "100", "--max-seq-len")


def test_prompt_that_is_not_there(cli: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("\n")
    assert_refused(cli("generate"), "--file")
    assert_refused(cli("generate", ""), "empty")
    assert_refused(cli("generate", "--file", file), "empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert_refused(cli("generate", "-"), "empty")
    assert_refused(cli("generate", "x", "--file", file), "two prompts", "--file")
    file.write_bytes(b"caf\xe9")
    assert_refused(cli("generate", "--file", file), file, "UTF-8")
    assert_refused(cli("generate", "--file", tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-0.1"),
        ("--temperature", "nan"),
        ("--temperature", "hot"),
        ("--top-k", "-1"),
        ("--top-k", "1.5"),
        ("--top-p", "0"),
        ("--top-p", "1.01"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--seed", "-1"),
        ("--seed", str(1 << 64)),
        ("--max-tokens", "0"),
        ("--stop", ""),
        ("--threads", "0"),
        ("--threads", "99999"),
        ("--max-seq-len", "0"),
        ("--max-seq-len", "513"),
        ("--max-seq-len", "long"),
        ("--backend", "abacus"),
        ("--tempurature", "1"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "x"), ("chat",)])
def test_option_out_of_range(
    cli: InProcess, tiny_checkpoint: Path, command: tuple[str, ...], option: str, value: str
) -> None:
    assert_refused(cli(*command, "--model", tiny_checkpoint, option, value), option)


def test_environment_that_makes_no_sense(cli_home: Path, tiny_checkpoint: Path) -> None:
    unknown_user = {"NUMBA_ATOMFLOW_HOME": "~nosuchuser/x"}
    assert_refused(run_cli(cli_home, "info", env=unknown_user), "NUMBA_ATOMFLOW_HOME", "~nosuchuser/x")
    generate = ("generate", "x", "--model", tiny_checkpoint)
    assert_refused(run_cli(cli_home, *generate, env=unknown_user), "NUMBA_ATOMFLOW_HOME", "~nosuchuser/x")
    for threads in ("0", "-1", "many"):
        assert_refused(run_cli(cli_home, "info", env={"NUMBA_NUM_THREADS": threads}), "NUMBA_NUM_THREADS", threads)
    assert run_cli(cli_home, "--help", env={"NUMBA_NUM_THREADS": "0"}).code == 0


def test_command_line_that_makes_no_sense(cli: InProcess, tiny_checkpoint: Path) -> None:
    assert_refused(cli("genrate", "x"), "genrate")
    assert_refused(cli("generate", "x", "y"), "y", "generate --help")
    assert_refused(cli("convert", "model.gguf"), "DEST")
    assert_refused(cli("generate", "x", "--top-p"), "--top-p")
    assert_refused(cli("info", "--verify"), "--verify")
    assert_refused(cli("info", tiny_checkpoint, "--max-seq-len", 0), "--max-seq-len")


# --- destinations ---------------------------------------------------------------------------------------------------


def test_destination_that_exists(cli: InProcess, tiny_folder: Path, destination: Path) -> None:
    destination.write_text("precious")
    assert_refused(cli("convert", tiny_folder, destination), destination, "overwrite")
    assert destination.read_text() == "precious"
    assert_refused(cli("convert", tiny_folder, destination.parent), destination.parent, "is a folder")
    assert_refused(cli("convert", tiny_folder, destination / "model.safetensors"), destination)
    assert names_in(destination.parent) == [destination.name]


def test_read_only_destination(
    cli: InProcess, tiny_folder: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destination.parent.chmod(0o555)
    if os.access(destination.parent, os.W_OK):  # root may write everywhere: refuse in the file system's place
        really_open = Path.open

        def refuse(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
            if path.parent == destination.parent and "r" not in mode:
                raise PermissionError(13, "Permission denied", str(path))
            return really_open(path, mode, *arguments, **more)

        monkeypatch.setattr(Path, "open", refuse)
    assert_refused(cli("convert", tiny_folder, destination), destination, "read-only")
    assert names_in(destination.parent) == []


def test_disk_without_room(
    cli: InProcess, tiny_folder: Path, destination: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(destination.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    assert_refused(cli("convert", tiny_folder, destination), destination, "free")
    assert names_in(destination.parent) == []


def test_disk_that_fills_up(cli_home: Path, tiny_folder: Path, destination: Path) -> None:
    """A limit on the size of files acts as a full disk: a write fails midway."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    outcome = run_cli(cli_home, "convert", tiny_folder, destination, before=limit)
    assert_refused(outcome, destination, "could not be written")
    assert names_in(destination.parent) == []


SLOW_CONVERSION = """
import sys, time
from numba_atomflow.cli import run
from numba_atomflow.quantize import rtn
quantize = rtn.quantize
def slowly(weights):
    time.sleep(0.2)
    return quantize(weights)
rtn.quantize = slowly
sys.exit(run(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_conversion_that_is_stopped(
    cli: InProcess, cli_home: Path, tiny_folder: Path, destination: Path, end: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_CONVERSION, str(tiny_folder), str(destination)],
        env=environment(cli_home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    watchdog = Watchdog(process, "a part of the checkpoint")
    while not any(path.stat().st_size > 100_000 for path in destination.parent.glob("*.partial-*")):
        watchdog.check()
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(end)
    _, err = finish(process)
    assert not destination.exists()
    if end == signal.SIGINT:
        assert (process.returncode, err) == (130, b"")
        assert names_in(destination.parent) == []
    else:
        assert process.returncode == -signal.SIGKILL
    assert cli("convert", tiny_folder, destination).code == 0
    assert names_in(destination.parent) == [destination.name]
    assert cli("info", destination, "--verify").code == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("form", ["--raw", "--json"])
def test_standard_output_on_a_full_disk(cli_home: Path, tiny_checkpoint: Path, form: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command_line("generate", "x", form, "-n", 3, "--model", tiny_checkpoint),
            env=environment(cli_home),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Standard output could not be written")
    assert done.stderr.count("\n") == 1


def redirected(home: Path, redirection: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line under a redirection of the shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", *command_line(*arguments)],
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("--version",), ("--help",), (), ("chat", "--help")])
def test_help_on_a_full_disk(cli_home: Path, arguments: tuple[str, ...]) -> None:
    done = redirected(cli_home, ">/dev/full", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Standard output could not be written")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_unwritable_standard_error_stops_no_work(cli_home: Path, tiny_checkpoint: Path) -> None:
    command = ("generate", "x", "-n", 3, "--model", tiny_checkpoint)
    for redirection in ("2>/dev/full", "2>&-"):
        done = redirected(cli_home, redirection, *command)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    assert redirected(cli_home, "2>/dev/full", "genrate").returncode == 2


def test_closed_standard_streams(cli_home: Path, tiny_checkpoint: Path) -> None:
    for arguments in (("info",), ("--version",), ("info", tiny_checkpoint)):
        done = redirected(cli_home, ">&-", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    chat = redirected(cli_home, "<&-", "chat", "--model", tiny_checkpoint)
    assert (chat.returncode, chat.stdout, chat.stderr) == (0, "", "")
    prompt = redirected(cli_home, "<&-", "generate", "-", "--model", tiny_checkpoint)
    assert (prompt.returncode, prompt.stderr) == (2, "error: The prompt is empty; give some text.\n")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            MemoryError("Unable to allocate 8.00 GiB"),
            "too little free memory for this (Unable to allocate 8.00 GiB); ask",
        ),
        (MemoryError(), "too little free memory for this; ask for less"),
    ],
)
def test_too_little_memory_is_no_bug(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: MemoryError, said: str
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(numba_atomflow.engine.Engine, "load", fail)
    assert_refused(cli("generate", "x", "--model", tiny_checkpoint), said)


# --- mistakes of this program ---------------------------------------------------------------------------------------


def test_the_unexpected_is_one_line_and_a_traceback_for_those_who_ask(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(numba_atomflow.engine.Engine, "load", fail)
    monkeypatch.delenv("NUMBA_ATOMFLOW_DEBUG", raising=False)
    outcome = cli("generate", "x", "--model", tiny_checkpoint)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "KeyError: 'lost'" in outcome.err
    assert "NUMBA_ATOMFLOW_DEBUG=1" in outcome.err

    monkeypatch.setenv("NUMBA_ATOMFLOW_DEBUG", "1")
    with pytest.raises(KeyError):
        cli("generate", "x", "--model", tiny_checkpoint)
