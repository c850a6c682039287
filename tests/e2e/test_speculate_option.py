"""`--speculate` of `generate` and `chat`: the same text, and the counts in reports."""

import json
from pathlib import Path

import pytest
from cli_runner import InProcess

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
