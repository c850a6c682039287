"""scripts/mask_cost.py: the CPU time of constraints, call by call."""

import json
from pathlib import Path

import mask_cost
import pytest

pytest.importorskip("llguidance", reason="needs the extra guided")


def test_seconds_of_each_kind_of_call(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tiny_checkpoint), "--replies", "1", "--threads", "1"]
    assert mask_cost.main([*given, "--json"]) == 0
    seconds = json.loads(capsys.readouterr().out)["seconds"]
    assert len(seconds["compile"]) == 1
    assert len(seconds["mask"]) == len(seconds["list"]) > 1
    assert mask_cost.main(given) == 0
    assert "vocabulary" in capsys.readouterr().out
    assert mask_cost.main(["no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
