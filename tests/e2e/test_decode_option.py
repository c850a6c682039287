"""``--decode`` on the command line, and what `info` and `bench` say of the path."""

import csv
import io
import json
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused
from pretended_gpu import PretendedDriver

from numba_atomflow.backends.base import DecodePath

REASON = "this GPU's compute capability is 8.9, and bulk copies need 9.0"


@pytest.fixture
def _ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU before bulk copies, as far as it can be pretended: no model can be loaded onto it."""
    pytest.importorskip("numba_cuda", reason="the CUDA backend is made of it; there is none for macOS")
    PretendedDriver((8, 9)).install(monkeypatch)


def commands(model: Path, folder: Path) -> dict[str, tuple[object, ...]]:
    """A command line of every command that makes tokens."""
    text = folder / "text.txt"
    text.write_text("The river begins in the Alps.")
    return {
        "generate": ("generate", "x", "--model", model),
        "chat": ("chat", "--model", model),
        "perplexity": ("perplexity", model, "--text", text),
        "validate": ("validate", model, "--diff-backends", "--prompt", "x"),
        "bench": ("bench", model, "--no-compile-times"),
        "bench, compile times": ("bench", model),
        "profile": ("profile", model),
    }


NAMES = ("generate", "chat", "perplexity", "validate", "bench", "bench, compile times", "profile")


@pytest.mark.parametrize("command", NAMES)
def test_the_cpu_has_no_choice(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, command: str) -> None:
    line = commands(tiny_checkpoint, tmp_path)[command]
    assert_refused(cli(*line, "--backend", "cpu", "--decode", "graph"), "--decode graph", "use --backend cuda")
    assert_refused(cli(*line, "--backend", "cpu", "--prefill", "gemm"), "--prefill gemm", "use --backend cuda")


@pytest.mark.usefixtures("_ada")
@pytest.mark.parametrize("command", [name for name in NAMES if name != "bench, compile times"])
def test_what_the_gpu_cannot_do_is_refused_with_the_reason(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, command: str
) -> None:
    outcome = cli(*commands(tiny_checkpoint, tmp_path)[command], "--decode", "persistent")
    assert_refused(outcome, "--decode persistent", REASON, "use --decode graph")


def test_a_start_for_compile_times_gets_the_option_and_its_refusal_is_the_sentence(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("numba_atomflow.cli.model_choice.ChosenModel.open")  # it would refuse, too
    outcome = cli("bench", tiny_checkpoint, "--decode", "graph", "--threads", 1)
    assert_refused(outcome, "--threads", "--decode graph")
    assert "compile times" not in outcome.err


def test_an_unknown_path_is_refused(cli: InProcess, tiny_checkpoint: Path) -> None:
    assert_refused(cli("generate", "x", "--model", tiny_checkpoint, "--decode", "quick"), "--decode", "persistent")


@pytest.mark.usefixtures("_ada")
def test_info_tells_how_this_gpu_would_decode(cli: InProcess, tiny_checkpoint: Path) -> None:
    record = json.loads(cli("info", tiny_checkpoint, "--backend", "cuda", "--json").out)
    assert record["memory_plan"]["device"]["decode"] == {"name": "graph", "reason": REASON}
    table = cli("info", tiny_checkpoint, "--backend", "cuda").out.splitlines()
    (row,) = (line for line in table if line.startswith("decode"))
    assert row.split(maxsplit=1)[1] == f"graph, because {REASON}"


def test_info_says_nothing_of_it_for_a_cpu(cli: InProcess, tiny_checkpoint: Path) -> None:
    assert json.loads(cli("info", tiny_checkpoint, "--backend", "cpu", "--json").out)["memory_plan"]["device"] == {}
    assert "decode" not in cli("info", tiny_checkpoint, "--backend", "cpu").out


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (DecodePath("persistent"), "decode: persistent"),
        (DecodePath("graph", REASON), f"decode: graph, because {REASON}"),
    ],
)
def test_bench_and_profile_tell_which_path_was_taken(
    cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, path: DecodePath, line: str
) -> None:
    monkeypatch.setattr("numba_atomflow.ops.bandwidth.read_bandwidth", lambda: 10.0)
    monkeypatch.setattr("numba_atomflow.backends.cpu.CpuBackend.decode_path", path)
    benchmark = ("bench", tiny_checkpoint, "-n", 2, "-p", 2, "-r", 1, "--threads", 1, "--no-compile-times")
    profile = ("profile", tiny_checkpoint, "-r", 1, "--threads", 1)
    for command in (benchmark, profile):
        assert line in cli(*command).out.splitlines()
        assert json.loads(cli(*command, "--json").out)["decode"] == {"name": path.name, "reason": path.reason}
    (row,) = csv.DictReader(io.StringIO(cli(*benchmark, "--format", "csv").out))
    assert row["decode"] == path.name
