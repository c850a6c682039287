"""What a refused option is called in the message: as on the command line, whatever it is called in Python."""

from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused

GENERATE = ("generate", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*GENERATE, "--model", ""), "--model is ''; it must be the path of a file"),
        (("chat", "--model", ""), "--model is ''"),
        (("info", ""), "MODEL is ''"),
        (("convert", "", "x"), "SOURCE is ''"),
        ((*GENERATE, "--logprobs", "21"), "--logprobs is 21; it must be between 0 and 20."),
        ((*GENERATE, "--prompt-logprobs", "-1"), "--prompt-logprobs is -1"),
        ((*GENERATE, "--top-p", "2"), "--top-p is 2.0"),
        (("bench", "-p", "0"), "--prompt-tokens is 0"),
        (("bench", "-r", "0"), "--repeats is 0"),
    ],
)
def test_an_option_is_named_as_typed(
    cli: InProcess, tiny_checkpoint: Path, arguments: tuple[str, ...], said: str
) -> None:
    model = () if "" in arguments else (tiny_checkpoint,) if arguments[0] == "bench" else ("--model", tiny_checkpoint)
    assert_refused(cli(*arguments, *model), f"error: {said}")


def test_the_draft_is_not_called_the_model(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli(*GENERATE, "--model", tiny_checkpoint, "--draft", "", "--backend", "cpu")
    assert_refused(outcome, "error: --draft is ''; it must be the path of a file")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((*GENERATE, "--json-schema", ""), "--json-schema"),
        ((*GENERATE, "--save-state", ""), "--save-state"),
        (("generate", "--file", ""), "--file"),
        (("convert", "x", ""), "DEST"),
        (("batch", "run", "x.jsonl", ""), "OUT"),
        (("validate", "--ground-truth", ""), "--ground-truth"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(cli: InProcess, arguments: tuple[str, ...], named: str) -> None:
    assert_refused(cli(*arguments), named, "it is empty; give a path")
