"""scripts/mask_cost.py: the CPU time of constraints, call by call."""

import json
from pathlib import Path

import mask_cost
import pytest

pytest.importorskip("llguidance", reason="needs the extra guided")
pytest.importorskip("jsonschema", reason="needs the extra serve-test")


def test_seconds_of_each_kind_of_call(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tiny_checkpoint), "--replies", "1", "--threads", "1"]
    assert mask_cost.main([*given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    seconds, replies = record["seconds"], record["replies"]
    assert len(seconds["compile"]) == 1
    assert len(seconds["mask"]) == len(seconds["list"]) > 1
    assert replies["valid"] + replies["cut"] == 1
    assert replies["violating"] == 0
    assert mask_cost.main(given) == 0
    assert "vocabulary" in capsys.readouterr().out
    assert mask_cost.main(["no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err


def test_replies_are_judged() -> None:
    city = '{"name": "Paris", "kind": "home"}'
    assert mask_cost.satisfies(city, mask_cost.CITY)
    for text in (city[:-1], city.replace("home", "house"), "[]"):
        assert not mask_cost.satisfies(text, mask_cost.CITY)
