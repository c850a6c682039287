"""The KV cache as a file on the command line: generate --save-state and --load-state."""

import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused, names_in, run_cli
from tiny_models import write_hf_folder

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.convert import convert

LONG = "Once upon a time there was a river, and on its banks lived a fox. " * 6


def test_a_later_prompt_takes_what_it_has_in_common_from_the_file(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "state.kv"
    common = ("generate", "--model", tiny_checkpoint, "-n", 8)
    first = cli(*common, LONG, "--save-state", file)
    assert first.code == 0, first.err
    without = cli(*common, LONG + "So", "--json")
    loaded = cli(*common, LONG + "So", "--load-state", file, "--json")
    assert loaded.code == 0, loaded.err
    with_file, alone = json.loads(loaded.out), json.loads(without.out)
    assert with_file["stats"]["reused_tokens"] >= len(LONG)  # each byte is a token of this model
    assert alone["stats"]["reused_tokens"] == 0
    assert with_file["token_ids"] == alone["token_ids"]
    report = cli(*common, LONG + "So", "--load-state", file).err
    assert f"prompt   {len(LONG) + 2} tokens, {with_file['stats']['reused_tokens']} of them cached, TTFT" in report


@pytest.mark.slow  # numba is loaded in three processes
def test_the_default_model_goes_on_in_another_process(smollm2_home: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.kv"
    first = run_cli(smollm2_home, "generate", LONG, "-n", "20", "--save-state", str(file), "--json")
    again = run_cli(smollm2_home, "generate", LONG, "-n", "20", "--load-state", str(file), "--json")
    assert (first.code, again.code) == (0, 0), again.err
    before, after = json.loads(first.out), json.loads(again.out)
    assert after["token_ids"] == before["token_ids"]
    assert after["stats"]["reused_tokens"] == after["stats"]["prompt_tokens"] - 1


def test_what_the_command_saves_python_loads(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "state.kv"
    outcome = cli("generate", "--model", tiny_checkpoint, "-n", 3, "abc", "--save-state", file, "--json")
    with Engine.load(tiny_checkpoint, "cpu") as engine:
        assert engine.load_state(file) == []
        generation = engine.generate("abc", SamplingParams(max_tokens=3)).finish()
    assert generation.token_ids == json.loads(outcome.out)["token_ids"]


def test_files_that_cannot_be_used_are_refused_before_the_reply(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    common = ("generate", "--model", tiny_checkpoint, "-n", 3, "abc")
    assert_refused(cli(*common, "--save-state", precious), precious, "exists", "--overwrite")
    assert_refused(cli(*common, "--save-state", tmp_path / "nowhere" / "x"), "There is no folder")
    assert_refused(cli(*common, "--overwrite"), "--save-state")
    assert_refused(cli(*common, "--load-state", precious), precious)
    assert_refused(cli(*common, "--load-state", tmp_path / "missing"), "does not exist")
    assert precious.read_text() == "precious"
    assert names_in(tmp_path) == ["precious.txt"]
    assert cli(*common, "--save-state", precious, "--overwrite").code == 0
    short = ("generate", "--model", tiny_checkpoint, "--max-seq-len", 4, "-n", 1, "a")
    assert_refused(
        cli(*short, "--load-state", precious), precious, "5 tokens, but the context holds 4", "--max-seq-len"
    )


def test_a_state_of_another_model_is_refused(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, other_checkpoint: Path
) -> None:
    file = tmp_path / "state.kv"
    assert cli("generate", "--model", tiny_checkpoint, "-n", 1, "abc", "--save-state", file).code == 0
    outcome = cli("generate", "--model", other_checkpoint, "-n", 1, "abc", "--load-state", file)
    assert_refused(outcome, file, f"another model ({tiny_checkpoint.name}) than {other_checkpoint.name}")


@pytest.fixture
def other_checkpoint(tmp_path: Path) -> Path:
    """A model of the same geometry, with other weights."""
    write_hf_folder(tmp_path / "other", seed=1)
    return convert(tmp_path / "other", tmp_path / "other.safetensors")
