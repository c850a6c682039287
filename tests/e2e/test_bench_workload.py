"""`numba-atomflow bench --workload`: prompts decoded with and without speculation, and what is refused."""

import csv
import io
import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused

from numba_atomflow.perf.workload import read_workload

FAST = ("-n", 12, "-r", 2, "--threads", 1, "--backend", "cpu")
WORKLOADS = sorted((Path(__file__).parents[1] / "workloads").glob("*.jsonl"))


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abcabcabc"}\n\n{"prompt": "Hello", "chat": true}\n')
    return path


def test_a_table_has_a_row_for_each_prompt_and_one_for_all(
    cli: InProcess, tiny_checkpoint: Path, workload: Path
) -> None:
    outcome = cli("bench", tiny_checkpoint, "--workload", workload, *FAST)
    assert outcome.code == 0
    head, table = outcome.out.split("\n\n")
    for line in ("speculation: lookup", f"workload: {workload}, 12 tokens at most, 2 turns of each kind"):
        assert line in head.splitlines()
    header, *rows = table.splitlines()
    assert "tokens per step" in header
    assert [row.split()[0] for row in rows] == ["1", "2", "all"]


def test_json_and_csv_have_the_counts(cli: InProcess, tiny_checkpoint: Path, workload: Path) -> None:
    report = json.loads(cli("bench", tiny_checkpoint, "--workload", workload, *FAST, "--json").out)
    first, second = report["results"]
    for result in (first, second):
        assert 2 <= result["tokens"] <= 12
        assert result["steps"] + result["accepted"] == result["tokens"] - 1
        assert result["ratio"] == result["speculative_speed"]["median"] / result["plain_speed"]["median"]
    assert report["total"]["tokens"] == first["tokens"] + second["tokens"] - 1
    seconds = sum((result["tokens"] - 1) / result["plain_speed"]["median"] for result in (first, second))
    assert report["total"]["plain_speed"]["median"] == pytest.approx((report["total"]["tokens"] - 1) / seconds)
    table = cli("bench", tiny_checkpoint, "--workload", workload, *FAST, "--format", "csv").out
    assert [row["prompt"] for row in csv.DictReader(io.StringIO(table))] == ["1", "2"]
    assert cli("bench", tiny_checkpoint, "--workload", workload, *FAST, "--format", "md").out.count("| ") > 20


def test_a_draft_model_is_compared_with_plain_decoding(cli: InProcess, tiny_checkpoint: Path, workload: Path) -> None:
    command = ("bench", tiny_checkpoint, "--draft", tiny_checkpoint)
    outcome = cli(*command, "--workload", workload, *FAST)
    assert f"speculation: draft, by {tiny_checkpoint}" in outcome.out.splitlines()
    assert "draft tok/s" in outcome.out
    assert_refused(cli(*command), "--draft needs real text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", 'is no JSON object with a "prompt"'),
        ('{"prompt": "a"}\nnone', "Line 2 of "),
        ('{"prompt": ""}', '"prompt" must be a text'),
        ('{"prompt": "a", "chat": 1}', '"chat" true or false'),
        ("[1]", "is no JSON object"),
        ("\n", "holds no prompt"),
    ],
)
def test_a_file_that_is_no_workload_is_refused(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(text)
    assert_refused(cli("bench", tiny_checkpoint, "--workload", path), message)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """JSON allows U+2028 and others within a text, and a file may come from Windows."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a\u2028b\u0085c"}\r\n{"prompt": "d"}\r\n', newline="")
    assert [prompt.text for prompt in read_workload(path)] == ["a\u2028b\u0085c", "d"]


def test_a_prompt_that_does_not_fit_is_refused(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "long " * 2000}))
    outcome = cli("bench", tiny_checkpoint, "--workload", path, *FAST)
    assert_refused(outcome, "shorten it")
    assert "--max-seq-len" not in outcome.err  # which this command does not have


def test_options_of_the_other_benchmark_are_refused(cli: InProcess, tiny_checkpoint: Path, workload: Path) -> None:
    for options in (("--depths", "8"), ("--prompt-tokens", "8"), ("--compare", workload)):
        assert_refused(cli("bench", tiny_checkpoint, "--workload", workload, *options), "--workload takes neither")
    assert_refused(cli("bench", tiny_checkpoint, "--workload", workload, "-n", 1), "--decode-tokens of at least 2")
    assert_refused(cli("bench", tiny_checkpoint, "--workload", workload.parent / "none"), "cannot be read")


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_the_workloads_of_the_repository_are_read(path: Path) -> None:
    prompts = read_workload(path)
    assert len(prompts) == 5
    assert all(prompt.chat == (path.stem == "chat") for prompt in prompts)
