"""`--speculate` and `--draft`: the same text, the counts in reports, and what is refused."""

import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused

from numba_atomflow.backends.base import Verification
from numba_atomflow.backends.cpu import CpuBackend

RUN = ("generate", "abcabcabcabc", "-n", 60, "--ignore-eos", "--backend", "cpu", "--threads", 1)


def test_the_text_is_the_same_and_json_has_the_counts(cli: InProcess, tiny_checkpoint: Path) -> None:
    off, lookup = (
        json.loads(cli(*RUN, "--model", tiny_checkpoint, "--speculate", how, "--json").out) for how in ("off", "lookup")
    )
    assert (off["text"], off["token_ids"]) == (lookup["text"], lookup["token_ids"])
    assert (off["sampling"]["speculate"], lookup["sampling"]["speculate"]) == ("off", "lookup")
    assert [off["stats"][name] for name in ("steps", "proposed_tokens", "accepted_tokens")] == [59, 0, 0]
    stats = lookup["stats"]
    assert stats["steps"] + stats["accepted_tokens"] == 59
    assert stats["mean_accepted_length"] == 59 / stats["steps"]


def test_a_report_has_a_line_where_something_was_proposed(cli: InProcess, tiny_checkpoint: Path) -> None:
    """The first longer steps do not depend on measured times: at least three are tried."""
    assert "proposed tokens, " in cli(*RUN, "--model", tiny_checkpoint).err
    assert "proposed" not in cli(*RUN, "--model", tiny_checkpoint, "--speculate", "off").err


def test_a_backend_that_cannot_is_an_error_only_where_it_is_required(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuBackend, "verification", Verification(1, "it is a test"))
    assert cli(*RUN, "--model", tiny_checkpoint).code == 0
    outcome = cli(*RUN, "--model", tiny_checkpoint, "--speculate", "lookup")
    assert outcome.code == 2
    assert "because it is a test" in outcome.err


def test_a_choice_that_does_not_exist_is_refused(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli(*RUN, "--model", tiny_checkpoint, "--speculate", "always")
    assert outcome.code == 2
    assert "--speculate" in outcome.err


def test_a_draft_model_changes_no_text_and_is_named(cli: InProcess, tiny_checkpoint: Path) -> None:
    run = (*RUN, "--model", tiny_checkpoint)
    off = json.loads(cli(*run, "--speculate", "off", "--json").out)
    drafted = json.loads(cli(*run, "--draft", tiny_checkpoint, "--json").out)
    assert (off["text"], off["token_ids"]) == (drafted["text"], drafted["token_ids"])
    assert (off["model"]["draft"], drafted["model"]["draft"]) == (None, str(tiny_checkpoint))
    assert drafted["stats"]["drafting_seconds"] > 0
    outcome = cli(*run, "--draft", tiny_checkpoint, "--speculate", "draft")
    assert outcome.out.rstrip() == off["text"].rstrip()
    assert f"draft    {tiny_checkpoint.stem}, " in outcome.err


def test_memory_of_a_draft_model_is_shown_beside_the_other(cli: InProcess, tiny_checkpoint: Path) -> None:
    command = ("info", tiny_checkpoint, "--backend", "cpu", "--draft", tiny_checkpoint)
    record = json.loads(cli(*command, "--json").out)
    assert record["draft"]["memory_plan"] == record["memory_plan"]
    lines = cli(*command).out.splitlines()
    assert f"draft model           {tiny_checkpoint}, {record['parameters']:,} parameters" in lines
    total = 2 * record["memory_plan"]["allocated_total"]
    assert lines[-1].split() == ["both", "allocated", *f"{total / 1e6:.1f} MB".split()]
    assert_refused(cli(*command, "--gpus", 2), "--draft is for one GPU")
    assert_refused(cli("info", "--draft", tiny_checkpoint), "--draft needs a model")
    assert_refused(cli(*command[:-1], ""), "--draft is ''; it must be the path of a file")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_contradictions_are_refused_before_a_model_is_loaded(cli: InProcess, command: str) -> None:
    prompt = ("x",) if command == "generate" else ()
    for options, message in (
        (("--speculate", "draft"), "--speculate draft needs a draft model; give --draft MODEL as well"),
        (("--speculate", "off", "--draft", "none"), "--draft is not for --speculate off"),
        (("--speculate", "lookup", "--draft", "none"), "--draft is not for --speculate lookup"),
    ):
        assert_refused(cli(command, *prompt, "--model", "none", *options), message)
