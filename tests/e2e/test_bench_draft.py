"""scripts/bench_draft.py: replies with a draft model, by the number of proposed tokens."""

import json
from pathlib import Path

import bench_draft
import pytest
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow.convert import convert


def test_a_row_for_each_length(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = tmp_path / "prompts.jsonl"
    workload.write_text('{"prompt": "abcabc"}\n{"prompt": "Hello", "chat": true}\n')
    given = [str(tiny_checkpoint), str(tiny_checkpoint), "--workload", str(workload), "--tokens", "16", "-r", "1"]
    assert bench_draft.main([*given, "--lengths", "1,7", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    plain, one, seven, chosen = record["lengths"]
    assert [row["proposed per step"] for row in record["lengths"]] == [0, 1, 7, "chosen"]
    assert (plain["tokens per step"], plain["speed"]) == (1, 1)
    assert one["accepted"] == seven["accepted"] == 1
    assert 1 < one["tokens per step"] < seven["tokens per step"] <= 8
    assert chosen["accepted"] is None  # a model as slow as the other never pays
    assert all(seconds > 0 for seconds in record["overhead_seconds"].values())
    assert bench_draft.main([*given, "--lengths", "2"]) == 0
    assert "the host's part of 4 proposed tokens after a text of 100" in capsys.readouterr().out
    assert bench_draft.main([str(tiny_checkpoint), "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err


def test_a_draft_with_too_few_positions_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hf_folder(tmp_path / "hf", tiny_geometry(vocabulary=SMALLEST_VOCABULARY, max_positions=192))
    short = str(convert(tmp_path / "hf", tmp_path / "short.safetensors"))
    assert bench_draft.main([short, short]) == 2
    captured = capsys.readouterr()
    assert f"The draft model {short} has 192 positions" in captured.err
    assert "takes 193; choose one with more." in captured.err
    assert captured.out == ""


def test_the_text_grows_to_the_positions_that_are_asked_for() -> None:
    longest = bench_draft.SHORT + bench_draft.PROPOSALS
    assert longest + bench_draft.PROPOSED - 1 == bench_draft.MOST_POSITIONS == 193
