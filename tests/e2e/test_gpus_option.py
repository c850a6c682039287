"""Every command that runs a model takes ``--gpus N``: over a pretended driver, whose kernels compute nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_runner import InProcess
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

import bench_gpus

from numba_atomflow.backends.cuda.queue import TokenRing
from numba_atomflow.backends.cuda.tensor_parallel import rank
from numba_atomflow.backends.cuda.wide_sampling import WideSampling
from numba_atomflow.ops.cuda.persistent.trace import EVENTS

DEVICE = "2 x Pretended GPU, CUDA 13.0"


@pytest.fixture(autouse=True)
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are zero, every chosen token is number 40, and each op of a trace takes a microsecond."""

    def times(self: rank.Rank) -> np.ndarray:
        shape = self.kernels.persistent_shape
        ends = 1000.0 * np.arange(1, shape.ops + 1)
        return np.broadcast_to(ends[:, None], (shape.sms, shape.ops, EVENTS)).copy()

    pretend_compiler(monkeypatch)
    machine = PretendedDriver().install(monkeypatch)
    machine.gpus = 2
    monkeypatch.setattr(TokenRing, "receive", lambda _self, _number, _check: 40)
    monkeypatch.setattr(rank.Rank, "read_times", times)


def test_generate(cli: InProcess, tiny_checkpoint: Path) -> None:
    outcome = cli("generate", "--model", tiny_checkpoint, "--gpus", "2", "-n", "5", "--json", "The river")
    assert outcome.code == 0, outcome
    record = json.loads(outcome.out)
    assert record["backend"]["device"] == DEVICE
    assert record["token_ids"] == [40] * 5


def test_perplexity(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The river begins in the Alps, and ends in the sea.")
    outcome = cli(
        "perplexity", tiny_checkpoint, "--gpus", "2", "--text", tmp_path / "text", "--context", "16", "--json"
    )
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["perplexity"] == pytest.approx(288), "of equal logits"


def test_bench(cli: InProcess, tiny_checkpoint: Path) -> None:
    fast = ("--depths", "0", "-n", "4", "-p", "4", "--repeats", "1", "--no-compile-times")
    outcome = cli("bench", tiny_checkpoint, "--gpus", "2", *fast, "--json")
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["device"] == DEVICE


@pytest.mark.slow
def test_profile_with_a_timeline(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need it")
    picture = tmp_path / "timeline.png"
    outcome = cli("profile", tiny_checkpoint, "--gpus", "2", "--repeats", "1", "--timeline", picture, "--json")
    assert outcome.code == 0, outcome
    assert picture.stat().st_size > 1000
    assert json.loads(outcome.out)["device"] == DEVICE


def test_validate(cli: InProcess, tiny_checkpoint: Path) -> None:
    given = ("-p", "Hi", "--decode-steps", "2", "--replay", "2")
    outcome = cli("validate", tiny_checkpoint, "--gpus", "2", *given)
    assert outcome.code == 0, outcome
    assert DEVICE in outcome.out


def test_widths_are_compared_with_decode_steps(cli: InProcess, tiny_checkpoint: Path) -> None:
    """Kernels that compute nothing write no keys."""
    outcome = cli("validate", tiny_checkpoint, "--gpus", "2", "--widths", "1,2,8", "-p", "Hi")
    assert outcome.code == 1, outcome
    assert "FAIL: steps of 1 tokens differ from decode steps, first in layer.0.k" in outcome.out


def test_chunks_cannot_be_compared(cli: InProcess, tiny_checkpoint: Path) -> None:
    given = ("--diff-chunks", "-p", "The river begins in the Alps")
    outcome = cli("validate", tiny_checkpoint, "--gpus", "2", *given)
    assert outcome.code != 0
    assert "steps under observation take one token; use --widths, or --diff-gpus" in " ".join(outcome.err.split())


def test_proposals_are_checked(cli: InProcess, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WideSampling, "posted", lambda _self, _row: 1 << 32 | 40)
    how = ("--speculate", "lookup", "--temperature", "1", "--seed", "1", "-n", "20", "--json")
    outcome = cli("generate", "--model", tiny_checkpoint, "--gpus", "2", *how, "ha ha ha ha ha ha ha ha")
    assert outcome.code == 0, outcome
    record = json.loads(outcome.out)
    assert record["token_ids"] == [40] * 20


def test_the_comparison_with_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels that compute nothing leave what was in memory: only tokens are the same."""
    record = bench_gpus.compare(tiny_geometry(max_positions=80), 2, [0], 1, single=True)
    assert record["same_tokens"]
    assert (record["bits"]["reference"], record["bits"]["backend"]) == (
        "cuda (Pretended GPU, CUDA 13.0)",
        f"cuda ({DEVICE})",
    )
    bench_gpus.show(record)
    assert record["bits"]["verdict"] in capsys.readouterr().out
