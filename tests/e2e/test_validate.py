"""The commands ``ground-truth`` and ``validate``, with valid and invalid input."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from cli_runner import InProcess, assert_refused, names_in
from tiny_models import tiny_geometry, write_hf_folder

pytest.importorskip("transformers", reason="transformers makes the ground truth: pip install '.[validate]'")

from numba_atomflow import Engine
from numba_atomflow.checkpoint.safetensors import METADATA
from numba_atomflow.cli.report_files import ReportFiles
from numba_atomflow.convert import convert
from numba_atomflow.validate import check, make_ground_truth

TEXT = "The river begins in the Alps."
RHINE = (
    "The river Rhine begins in the Swiss Alps and flows through six countries to the North Sea. Along its way it "
    "passes vineyards, castles and large cities, and ships carry coal, oil, grain and containers up and down the "
    "stream. In the past hundred years, engineers have straightened its bed, and the people who live"
)


@pytest.fixture(scope="session")
def truth_file(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ground truth of the tiny model; not to be changed."""
    from numba_atomflow import cli

    path = tmp_path_factory.mktemp("truth") / "truth.safetensors"
    code = cli.run(["ground-truth", str(tiny_checkpoint), "-p", TEXT, "-o", str(path), "--decode-steps", "3"])
    assert code == 0
    return path


# --- valid input -----------------------------------------------------------------------------------------------------


def test_a_correct_model_passes(cli: InProcess, tiny_checkpoint: Path, truth_file: Path) -> None:
    outcome = cli("validate", tiny_checkpoint, "--ground-truth", truth_file)
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert lines[-1] == "PASS: 11/11 probes, 11/11 inner stages."
    assert sum(line.rstrip().endswith("PASS") for line in lines) == 11
    assert f"{len(TEXT)} prompt tokens, 3 decode steps" in outcome.out
    assert "arg-max agrees at 32 of 32 positions" in outcome.out


def test_the_last_line_names_the_first_failure(cli: InProcess, tiny_checkpoint: Path, truth_file: Path) -> None:
    outcome = cli("validate", tiny_checkpoint, "-g", truth_file, "--isolate", "--inject", "layer.1.attention")
    assert outcome.code == 1
    last = outcome.out.splitlines()[-1]
    assert last.startswith("FAIL: 10/11 probes")
    assert last.endswith(
        "first failing probe: layer.1.attention; op at fault: layer.1.attention (layer.1.attention, position 0)."
    )
    assert outcome.err == ""


def test_json_is_one_object(cli: InProcess, tiny_checkpoint: Path, truth_file: Path) -> None:
    outcome = cli("validate", tiny_checkpoint, "-g", truth_file, "--json", "--layers", "1:2", "--block", 7)
    record = json.loads(outcome.out)
    assert outcome.code == 0
    assert record["passed"] is True
    assert {entry["name"].rpartition(".")[0] for entry in record["probes"]} == {"layer.1"}
    assert all(0 <= entry["share"] < 1 for entry in record["probes"])
    spoilt = cli("validate", tiny_checkpoint, "-g", truth_file, "--json", "--inject", "lm_head")
    record = json.loads(spoilt.out)
    assert spoilt.code == 1
    assert record["fault"]["op"] == "lm_head"
    assert record["logits"]["next_token"] != record["logits"]["expected_token"]
    assert set(record["next_token"]) == {"model", "reference"}


def test_an_op_s_own_error_is_shown_beside_what_it_inherits(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path
) -> None:
    outcome = cli("validate", tiny_checkpoint, "-g", truth_file, "--added")
    assert outcome.code == 0
    assert re.search(r"decode +added +of its tolerance +inherited +worst element", outcome.out.splitlines()[0])
    spoilt = cli("validate", tiny_checkpoint, "-g", truth_file, "--added", "--json", "--inject", "layer.0.o")
    record = json.loads(spoilt.out)
    assert spoilt.code == 1
    assert record["fault"]["op"] == "layer.0.o"
    entries = {entry["name"]: entry for entry in record["probes"]}
    assert {name for name, entry in entries.items() if entry["added_share"] > 1} == {"layer.0.after_attention"}
    assert entries["layer.1.output"]["inherited"] > 1000 * entries["layer.1.output"]["added"]


def test_reports_are_written_beside_the_table(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path
) -> None:
    files = ("--junit", tmp_path / "report.xml", "--html", tmp_path / "report.html")
    outcome = cli("validate", tiny_checkpoint, "-g", truth_file, *files, "--inject", "layer.1.down")
    assert outcome.code == 1
    assert names_in(tmp_path) == ["report.html", "report.xml"]
    suites = ET.parse(tmp_path / "report.xml").getroot()
    assert int(suites.get("failures", "")) > 0
    ReportFiles(None, tmp_path / "report.xml", tmp_path / "report.html").check()  # the next run may replace them
    assert outcome.out.splitlines()[-1] in (tmp_path / "report.html").read_text()


def test_a_replay_compares_a_backend_with_itself(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ("validate", tiny_checkpoint, "--replay", 3, "-p", TEXT, "--decode-steps", 2, "--backend", "cpu")
    outcome = cli(*given, "--html", tmp_path / "report.html", "--junit", tmp_path / "report.xml")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1] == "PASS: 3 runs gave the same bits."
    assert names_in(tmp_path) == ["report.html", "report.xml"]
    record = json.loads(cli(*given, "--json").out)
    assert record["passed"] is True
    assert [part["name"] for part in record["parts"]][-3:] == ["layer.1.v", "logits", "tokens"]


def test_the_original_weights_as_reference(
    cli: InProcess, tiny_checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "original.safetensors"
    created = cli(
        "ground-truth", tiny_checkpoint, "-p", TEXT, "-o", path, "--decode-steps", "2", "--json",
        "--reference", "original", "--source", tiny_folder,
    )  # fmt: skip
    assert created.code == 0, created
    assert json.loads(created.out)["reference"] == "original"
    assert names_in(tmp_path) == ["original.safetensors"]
    outcome = cli("validate", tiny_checkpoint, "-g", path)
    assert outcome.code == 0
    assert "original weights" in outcome.out


def test_smollm2_passes_39_of_39(smollm2_checkpoint: Path) -> None:
    """A prompt of 64 tokens and 32 decode steps, with the checkpoint's weights."""
    with Engine.load(smollm2_checkpoint, "cpu", 96) as engine:
        tokens = engine.text.encode(RHINE)
        assert len(tokens) == 64
        truth = make_ground_truth(engine.checkpoint, tokens, 32)
        for isolate in (False, True):
            report = check(engine.backend, truth, isolate=isolate)
            assert report.verdict() == "PASS: 39/39 probes, 235/235 inner stages."
            assert report.logits is not None
            assert report.logits.agreed == 96


# --- invalid input ---------------------------------------------------------------------------------------------------


def changed(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a safetensors file with another header."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def metadata(**records: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[METADATA].update(records)


def test_a_replay_takes_no_options_of_a_comparison(cli: InProcess, tiny_checkpoint: Path, truth_file: Path) -> None:
    given = ("validate", tiny_checkpoint, "--replay", 2, "-p", TEXT)
    for more in (("--isolate",), ("--added",), ("--layers", "0:1"), ("--block", 4)):
        assert_refused(cli(*given, *more), "--replay", "leave")
    assert_refused(cli(*given[:4]), "--replay", "--prompt")
    assert_refused(cli("validate", tiny_checkpoint, "--replay", 1, "-p", TEXT), "--replay is 1", "at least 2")
    assert_refused(cli(*given, "-g", truth_file), "needs one reference")


@pytest.mark.parametrize("option", ["--junit", "--html"])
def test_reports_that_cannot_be_written_are_refused_first(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path, option: str
) -> None:
    def refused(path: object, *words: object) -> None:
        assert_refused(cli("validate", tiny_checkpoint, "-g", truth_file, option, path), *words)

    refused(tmp_path, tmp_path, "is a folder")
    refused(tmp_path / "none" / "report", "no folder", tmp_path / "none")
    refused(tmp_path / ("a" * 300), "File name too long")
    refused("/dev/null", "is a device")
    for contents in ("<!doctype html><title>A page</title>", "<?xml version='1.0'?><svg/>"):
        (tmp_path / "mine").write_text(contents)
        refused(tmp_path / "mine", "mine exists and is no report")
        assert (tmp_path / "mine").read_text() == contents


def test_two_reports_in_one_file_are_refused(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path
) -> None:
    files = ("--junit", tmp_path / "report", "--html", tmp_path / "." / "report")
    assert_refused(cli("validate", tiny_checkpoint, "-g", truth_file, *files), "different names")
    assert names_in(tmp_path) == []


def test_ground_truth_of_another_model(cli: InProcess, truth_file: Path, tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "deeper", tiny_geometry(layers=3))
    deeper = convert(tmp_path / "deeper", tmp_path / "deeper.safetensors")
    assert_refused(cli("validate", deeper, "-g", truth_file), truth_file, "another model", "layers is 2", "is 3")
    write_hf_folder(tmp_path / "twin", seed=1)
    twin = convert(tmp_path / "twin", tmp_path / "twin.safetensors")
    assert_refused(cli("validate", twin, "-g", truth_file), truth_file, "another checkpoint", "SHA-256")


@pytest.mark.parametrize("left", [0, 5, 300, 20_000, -1])
def test_truncated_ground_truth(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path, left: int
) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(truth_file.read_bytes()[:left])
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path)


def test_missing_and_misshapen_probes(cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "changed.safetensors"

    def rename(header: dict[str, Any]) -> None:
        header["layer.1.inputnorm"] = header.pop("layer.1.input_norm")

    def reshape(header: dict[str, Any]) -> None:
        header["layer.1.q"]["shape"].reverse()

    changed(truth_file, path, rename)
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "lacks the probe layer.1.input_norm")
    changed(truth_file, path, reshape)
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "layer.1.q", "not F32")


def test_other_tokens_and_another_prompt(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changed.safetensors"
    changed(truth_file, path, metadata(text="Another text."))
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "prompt tokens")
    refused = cli("validate", tiny_checkpoint, "-g", truth_file, "--prompt", "Another text.")
    assert_refused(refused, truth_file, "another prompt", TEXT)
    changed(truth_file, path, metadata(tokens=json.dumps([1, 2, 3])))
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "tokens")
    changed(truth_file, path, metadata(tokens=json.dumps([9999] * 32)))
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "tokens")


@pytest.mark.parametrize(
    ("records", "culprit"),
    [
        ({"format_version": "2"}, "format version '2'"),
        ({"format": "numba-atomflow"}, "not a ground truth"),
        ({"reference": "imagined"}, "imagined"),
        ({"tokens": "{"}, "description"),
        ({"tokens": "7"}, "description"),
        ({"prompt_tokens": "0"}, "tokens"),
        ({"prompt_tokens": "many"}, "description"),
        ({"geometry": "{}"}, "description"),
        ({"geometry": "[]"}, "description"),
    ],
)
def test_invalid_descriptions(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path, records: dict[str, str], culprit: str
) -> None:
    path = changed(truth_file, tmp_path / "changed.safetensors", metadata(**records))
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, culprit)


def test_a_missing_record(cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path) -> None:
    path = changed(
        truth_file, tmp_path / "changed.safetensors", lambda header: header[METADATA].pop("checkpoint_sha256")
    )
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "checkpoint_sha256")


def test_nan_in_a_ground_truth(cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.safetensors"
    data = bytearray(truth_file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    assert_refused(cli("validate", tiny_checkpoint, "-g", path), path, "NaN")


def test_other_files(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    assert_refused(cli("validate", tiny_checkpoint, "-g", missing), missing)
    assert_refused(cli("validate", tiny_checkpoint, "-g", tiny_checkpoint), tiny_checkpoint, "not a ground truth")
    assert_refused(cli("validate", tiny_checkpoint, "-g", tmp_path), tmp_path)


def test_without_transformers(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba_atomflow.validate import hugging_face

    find_spec = hugging_face.find_spec
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    refused = cli("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", tmp_path / "truth.safetensors")
    assert_refused(refused, "transformers is not installed", "numba-atomflow[validate]")
    assert names_in(tmp_path) == []


def test_sources_of_another_checkpoint(
    cli: InProcess, tiny_checkpoint: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "truth.safetensors"
    common = ("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", out)
    assert_refused(cli(*common, "--reference", "original"), "--source")
    assert_refused(cli(*common, "--source", tiny_folder), "--source")
    write_hf_folder(tmp_path / "other", seed=1)
    refused = cli(*common, "--reference", "original", "--source", tmp_path / "other")
    assert_refused(refused, tmp_path / "other", "made from")
    assert not out.exists()


def test_options_out_of_range(cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "truth.safetensors"
    given = ("validate", tiny_checkpoint, "-g", truth_file)
    assert_refused(cli("validate", tiny_checkpoint), "--ground-truth")
    assert_refused(cli(*given, "--diff-backends"), "--diff-backends")
    assert_refused(cli(*given, "--layers", "3"), "--layers '3'")
    assert_refused(cli(*given, "--layers", f"0:{'9' * 5000}"), "--layers '0:999")
    assert_refused(cli(*given, "--layers", "3:3"), "--layers 3:3 holds no layer")
    assert_refused(cli(*given, "--layers", "1:5"), "--layers 1:5")
    assert_refused(cli(*given, "--block", "0"), "--block")
    assert_refused(cli(*given, "--prefill", "fp8"), "use --prefill gemm")
    assert_refused(cli(*given, "--inject", "layer.9.qkv"), "layer.9.qkv")
    assert_refused(cli("ground-truth", tiny_checkpoint, "-p", "", "-o", out), "prompt is empty")
    assert_refused(
        cli("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", out, "--decode-steps", "-1"), "--decode-steps"
    )
    assert_refused(cli("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", out, "--decode-steps", "500"), "512")
    assert_refused(cli("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", truth_file), truth_file, "--overwrite")
    assert_refused(cli("ground-truth", tiny_checkpoint, "-p", TEXT, "-o", "/proc/truth.safetensors"), "/proc")
    assert names_in(tmp_path) == []


def test_one_backend_cannot_be_compared_with_itself(cli: InProcess, tiny_checkpoint: Path) -> None:
    assert_refused(cli("validate", tiny_checkpoint, "--diff-backends", "--backend", "cpu", "-p", TEXT), "CPU")
    assert_refused(cli("validate", tiny_checkpoint, "--diff-backends"), "--prompt")


def test_another_backend_is_compared_with_the_cpu(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other backend is the CPU backend under another name, with or without an injected fault."""
    load = Engine.load
    paths: list[tuple[str, str, str]] = []

    def pretend(model: str, backend: Any, *rest: Any, decode: str, prefill: str, **_others: Any) -> Engine:
        paths.append((backend, decode, prefill))
        engine = load(model, backend, *rest)
        engine.backend.name = "other" if backend == "auto" else engine.backend.name
        return engine

    monkeypatch.setattr(Engine, "load", pretend)
    given = ("validate", tiny_checkpoint, "--diff-backends", "-p", TEXT, "--decode-steps", "2")
    outcome = cli(*given, "--decode", "graph", "--prefill", "gemm")
    assert outcome.code == 0, outcome
    assert paths == [("auto", "graph", "gemm"), ("cpu", "auto", "auto"), ("auto", "graph", "gemm")]
    assert "other (" in outcome.out
    assert "against cpu backend" in outcome.out
    spoilt = cli(*given, "--inject", "layer.0.gate_up", "--isolate")
    assert spoilt.code == 1
    assert "op at fault: layer.0.gate_up" in spoilt.out.splitlines()[-1]


def test_a_prompt_in_chunks_is_compared_with_the_same_token_by_token(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("validate", tiny_checkpoint, "--diff-chunks", "-p", TEXT, "--decode-steps", "2", "--backend", "cpu")
    outcome = cli(*given)
    assert outcome.code == 0, outcome
    assert "against cpu backend, token by token" in outcome.out
    assert_refused(cli(*given[:3]), "--diff-chunks", "--prompt")
    assert_refused(cli(*given, "--diff-backends"), "one reference")
    assert_refused(cli(*given, "--block", "8"), "more than 8 tokens", "has 8", "a larger --block")
    blocks: list[int | None] = []
    from numba_atomflow.validate import compare, reference, walk

    def recorded(*arguments: Any, **options: Any) -> None:
        blocks.append(arguments[4])
        walk.walk(*arguments, **options)

    for module in (reference, compare):
        monkeypatch.setattr(module, "walk", recorded)
    assert cli(*given).code == 0
    assert blocks == [1, None]


def test_without_matplotlib(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba_atomflow.utils import plot

    monkeypatch.setattr(plot, "find_spec", lambda _name: None)
    refused = cli("validate", tiny_checkpoint, "-g", truth_file, "--plot", tmp_path / "errors.png")
    assert_refused(refused, "matplotlib", "numba-atomflow[plot]")


def test_a_copy_of_the_checkpoint_is_the_same_model(
    cli: InProcess, tiny_checkpoint: Path, truth_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copy(tiny_checkpoint, tmp_path / "copy.safetensors")
    assert cli("validate", copy, "-g", truth_file).code == 0
