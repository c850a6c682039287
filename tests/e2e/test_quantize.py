"""The commands ``quantize`` and ``perplexity``."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused, names_in
from tiny_models import SMALLEST_VOCABULARY, tiny_geometry, write_hf_folder

from numba_atomflow.checkpoint.format import Checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf_folder(tmp_path / "hf", tiny_geometry(vocabulary=SMALLEST_VOCABULARY))
    return tmp_path / "hf"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A red thing is not a blue thing, but both are things.\n" * 12)
    return path


def test_quantize_reports_what_calibration_found(cli: InProcess, folder: Path, text: Path, tmp_path: Path) -> None:
    destination = tmp_path / "model.safetensors"
    outcome = cli("quantize", folder, destination, "--calibration", text, "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert (record["path"], record["bytes"]) == (str(destination), destination.stat().st_size)
    assert (record["method"], record["head"]) == ("gptq", "fp16")
    assert record["calibration"]["text"] == "text.txt"
    assert all(pair["kept"] < pair["rtn"] for pair in record["calibration"]["errors"].values())
    table = cli("quantize", folder, destination, "--calibration", text, "--overwrite", "--method", "awq")
    assert table.out.count("rounded to nearest") == 4
    assert "awq, fp16 head" in table.out
    assert re.search(r"^LM head +fp16$", cli("info", destination).out, re.MULTILINE)


def test_rtn_is_the_same_as_convert(cli: InProcess, folder: Path, tmp_path: Path) -> None:
    assert cli("convert", folder, tmp_path / "a").code == 0
    assert cli("quantize", folder, tmp_path / "b", "--method", "rtn", "--lm-head", "fp8").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert cli("quantize", folder, tmp_path / "c", "--method", "rtn").code == 0
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        assert checkpoint.head == "fp16"


def test_quantize_refuses(cli: InProcess, folder: Path, text: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out" / "model"
    assert_refused(cli("quantize", folder, destination, "--group-size", 64), "--group-size is 64")
    assert_refused(cli("quantize", folder, destination, "--calibration", tmp_path / "no.txt"), tmp_path / "no.txt")
    assert_refused(cli("quantize", folder, destination, "--method", "rtn", "--calibration", text), "rtn")
    assert_refused(cli("quantize", folder, destination, "--method", "best"), "--method")
    assert_refused(cli("quantize", tmp_path / "nowhere", destination), tmp_path / "nowhere")
    text.write_text("short")
    assert_refused(cli("quantize", folder, destination, "--calibration", text), "text.txt", "too few")
    assert names_in(tmp_path) == ["hf", "text.txt"]
    destination.parent.mkdir()
    destination.write_text("mine")
    assert_refused(cli("quantize", folder, destination), destination, "--overwrite")
    assert names_in(destination.parent) == ["model"]


def test_perplexity(cli: InProcess, folder: Path, text: Path, tmp_path: Path) -> None:
    assert cli("convert", folder, tmp_path / "model").code == 0
    outcome = cli("perplexity", tmp_path / "model", "--text", text, "--context", 64, "--json")
    record = json.loads(outcome.out)
    assert (record["tokens"], record["context"], record["stride"]) == (len(text.read_text()) - 1, 64, 32)
    assert 50 < record["perplexity"] < 1000  # random weights: about the vocabulary of 259
    assert record["divergence"] is None
    table = cli("perplexity", tmp_path / "model", "--text", text).out
    for name in ("perplexity", "bits per byte", "tokens/s"):
        assert name in table


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is the reference")
def test_perplexity_against_the_source(cli: InProcess, folder: Path, text: Path, tmp_path: Path) -> None:
    kl = {}
    for method in ("rtn", "gptq"):
        path = tmp_path / method
        arguments = ["--calibration", text] if method != "rtn" else []
        assert cli("quantize", folder, path, "--method", method, *arguments).code == 0
        outcome = cli("perplexity", path, "--text", text, "--reference", folder, "--json")
        divergence = json.loads(outcome.out)["divergence"]
        kl[method] = divergence["mean_kl"]
        assert 0.8 < divergence["top1"] <= 1
    assert 0 < kl["gptq"] < kl["rtn"] < 0.05
    write_hf_folder(tmp_path / "other", tiny_geometry(vocabulary=SMALLEST_VOCABULARY), seed=1)
    refused = cli("perplexity", tmp_path / "rtn", "--text", text, "--reference", tmp_path / "other")
    assert_refused(refused, "is not what", tmp_path / "other")


def test_perplexity_refuses(cli: InProcess, folder: Path, text: Path, tmp_path: Path) -> None:
    assert cli("convert", folder, tmp_path / "model").code == 0
    model = tmp_path / "model"
    assert_refused(cli("perplexity", model, "--text", tmp_path / "no.txt"), tmp_path / "no.txt")
    assert_refused(cli("perplexity", tmp_path / "none", "--text", text), tmp_path / "none")
    assert_refused(cli("perplexity", model, "--text", text, "--context", 1), "--context is 1")
    assert_refused(cli("perplexity", model, "--text", text, "--context", 8, "--stride", 8), "--stride is 8")
    text.write_bytes(b"\xff")
    assert_refused(cli("perplexity", model, "--text", text), text, "UTF-8")
    text.write_text("")
    assert_refused(cli("perplexity", model, "--text", text), "too short")
