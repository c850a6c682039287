"""The comparison with other engines: the work is the same, what is missing is said, and ratios are of this run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import bench_peers  # puts scripts/peers on the path
import gguf
import llama_bench
import numpy as np
import pytest
from child_processes import run
from gguf.quants import dequantize
from protocol import Answer, Task
from tiny_models import tiny_geometry

from numba_atomflow.geometry import rope_inverse_frequencies
from numba_atomflow.model.config_json import config_json
from numba_atomflow.model.presets import PRESETS
from numba_atomflow.rope_scaling import Llama3Scaling
from numba_atomflow.sources.huggingface_config import config_geometry

TINY = tiny_geometry(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 256))
TASK = Task(TINY, prompt_tokens=6, decode_tokens=4, repeats=2, device="cpu")


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_survives_json() -> None:
    assert Task.from_json(TASK.to_json()) == TASK
    assert len(TASK.prompt()) == 6
    assert TASK.prompt() == TASK.prompt()
    assert TASK.positions == 11


def test_peers_that_read_a_config_read_this_geometry() -> None:
    for geometry in (TINY, *PRESETS.values()):
        assert config_geometry(Path("config.json"), config_json(geometry)) == geometry


# --- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_computes_what_it_is_asked() -> None:
    """Its steps with a static cache make the tokens that its own `generate` makes, turn after turn."""
    torch = pytest.importorskip("torch", reason="a peer: pip install torch transformers")
    pytest.importorskip("transformers", reason="a peer: pip install torch transformers")
    import hf_transformers

    torch.manual_seed(0)
    decoder = hf_transformers.StaticDecoder(TASK, "cpu", torch.float32)
    prompt = torch.tensor([TASK.prompt()])
    with torch.inference_mode():
        expected = decoder.model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 6:].tolist()
        for _ in range(2):
            assert [int(token) for token in decoder.turn(prompt, 4, decoder.step)] == expected


def test_transformers_answers() -> None:
    pytest.importorskip("torch", reason="a peer: pip install torch transformers")
    pytest.importorskip("transformers", reason="a peer: pip install torch transformers")
    import hf_transformers

    answer = hf_transformers.measure(replace(TASK, options={"compile": False}))
    assert len(answer.ttft) == len(answer.tpot) == 2
    assert min(answer.ttft + answer.tpot) > 0
    assert "cpu, BF16, static cache, eager" in answer.what


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_gguf_is_a_model_of_this_geometry(tmp_path: Path, tied: bool) -> None:
    geometry = replace(TINY, tied_embeddings=tied)
    path = tmp_path / "random.gguf"
    llama_bench.write_gguf(path, geometry)
    reader = gguf.GGUFReader(path)
    numbers = {
        "llama.block_count": geometry.layers,
        "llama.embedding_length": geometry.hidden,
        "llama.feed_forward_length": geometry.ffn,
        "llama.attention.head_count_kv": geometry.kv_heads,
        "llama.attention.key_length": geometry.head_dim,
        "llama.vocab_size": geometry.vocabulary,
    }
    assert {name: reader.fields[name].contents() for name in numbers} == numbers
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in tensors) != tied
    matrices = {name: tuple(reversed(t.shape.tolist())) for name, t in tensors.items() if len(t.shape) == 2}
    ours = sorted(shape for shape in geometry.parameters().values() if len(shape) == 2)
    assert sorted(matrices.values()) == ours
    down = tensors["blk.1.ffn_down.weight"]
    weights = dequantize(down.data, down.tensor_type)
    assert np.std(weights) * np.sqrt(geometry.ffn) == pytest.approx(1, abs=0.05)
    plain = rope_inverse_frequencies(replace(geometry, rope_scaling=None))
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"].data, rope_inverse_frequencies(geometry), rtol=1e-6)


def llama_bench_test(n_prompt: int, n_gen: int, n_depth: int, *speeds: float) -> dict[str, object]:
    return {
        "build_commit": "abc1234",
        "backends": "CUDA",
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "avg_ts": sum(speeds) / len(speeds),
        "samples_ts": list(speeds),
    }


LLAMA_BENCH = "loading backend\n" + json.dumps(
    [
        llama_bench_test(6, 0, 0, 600.0, 300.0),
        llama_bench_test(0, 4, 0, 200.0, 200.0),
        llama_bench_test(6, 0, 6, 100.0, 100.0),
        llama_bench_test(0, 4, 6, 125.0, 100.0),
    ]
)


def test_llama_bench_is_asked_for_a_reply_behind_the_prompt() -> None:
    task = replace(TASK, device="auto", threads=3)
    command = llama_bench.bench_command("/bin/llama-bench", Path("m.gguf"), task)
    assert command[:3] == ["/bin/llama-bench", "-m", "m.gguf"]
    pairs = dict(zip(command[1::2], command[2::2], strict=True))
    assert pairs == {
        "-m": "m.gguf",
        "-o": "json",
        "-p": "6",
        "-n": "4",
        "-d": "0,6",
        "-r": "2",
        "-ngl": "999",
        "-fa": "1",
        "-t": "3",
    }


def test_the_answer_of_llama_bench_is_read() -> None:
    answer = llama_bench.parse_bench(LLAMA_BENCH, TASK)
    assert answer.tpot == pytest.approx([0.008, 0.01])
    assert answer.ttft == pytest.approx([0.01, 0.02])
    assert "abc1234, CUDA" in answer.what


# --- all peers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_llama_bench(tmp_path: Path) -> Path:
    binary = tmp_path / "llama-bench"
    binary.write_text(f"#!{sys.executable}\nprint({LLAMA_BENCH!r})\n")
    binary.chmod(0o755)
    return binary


def test_peers_run_one_after_another_and_ratios_are_of_this_run(fake_llama_bench: Path) -> None:
    peers = [
        peer for peer in bench_peers.all_peers(str(fake_llama_bench)) if peer.name in ("numba-atomflow", "llama.cpp")
    ]
    told: list[str] = []
    outcomes = bench_peers.run_all(peers, TASK, told.append)
    assert told == ["[1/2] numba-atomflow", "[2/2] llama.cpp"]
    record = bench_peers.record_of(outcomes, TASK, "tiny")
    ours, theirs = record["peers"]
    assert ours["ratio"]["median"] == pytest.approx(1)
    speed = ours["decode_tokens_per_second"]["median"]
    assert theirs["decode_tokens_per_second"]["median"] == pytest.approx(112.5)
    assert theirs["ratio"]["median"] == pytest.approx(speed / 112.5)
    text = bench_peers.report(record, "md")
    assert (
        "| peer | decode tok/s | TTFT ms | decode, ours / theirs | prompt, ours / theirs | MB (private) | what |"
        in text
    )
    assert ours["prompt_ratio"]["median"] == pytest.approx(1)
    assert theirs["prompt_ratio"]["median"] == pytest.approx(0.015 / ours["ttft_seconds"]["median"])
    assert ours["peak_memory_bytes"] > ours["private_memory_bytes"] > 1e6
    assert "112.5 (102.5-122.5)" in text


def test_rounds_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers take turns, and one that fails is not run again."""
    answers = iter([("a", Answer("x", [1.0], [2.0], 5, 2)), ("b", None), ("a", Answer("x", [3.0], [4.0], 4, 3))])

    def run_peer(peer: bench_peers.Peer, _task: Task) -> bench_peers.Outcome:
        name, answer = next(answers)
        assert name == peer.name
        return bench_peers.Outcome(name, answer, "" if answer else "failed: it is broken")

    monkeypatch.setattr(bench_peers, "run_peer", run_peer)
    peers = [bench_peers.Peer("a", "a.py"), bench_peers.Peer("b", "b.py")]
    a, b = bench_peers.run_all(peers, TASK, lambda _text: None, 2)
    assert a.answer == Answer("x", [1.0, 3.0], [2.0, 4.0], 5, 2)
    assert b.problem == "failed: it is broken"


def test_what_is_missing_or_fails_is_said() -> None:
    absent = bench_peers.Peer("ghost", "ghost.py", ("no_such_module",), "pip install ghost")
    broken = bench_peers.LlamaCpp("llama.cpp", "llama_bench.py", options={"binary": "/bin/false"})
    without = bench_peers.all_peers(None)[-1]
    outcomes = bench_peers.run_all([absent, broken, without], TASK, lambda _text: None)
    assert outcomes[0].problem == "missing: no_such_module not installed; pip install ghost"
    assert outcomes[1].problem.startswith("failed: ")
    assert "/bin/false" in outcomes[1].problem
    assert outcomes[2].problem == "missing: give --llama-bench PATH"
    text = bench_peers.report(bench_peers.record_of(outcomes, TASK, "tiny"), "table")
    assert "give --llama-bench PATH" in text


def test_our_engine_takes_prompts_as_it_is_told() -> None:
    ours, *others = bench_peers.all_peers(None, "gemm")
    assert all("prefill" not in peer.options for peer in others)
    outcome = bench_peers.run_peer(ours, TASK)  # on the CPU, which has one way
    assert "--prefill gemm is for the CUDA backend" in outcome.problem


def test_our_own_ratio_needs_our_own_run() -> None:
    outcome = bench_peers.Outcome("llama.cpp", Answer("x", [1.0], [0.5]))
    (row,) = bench_peers.record_of([outcome], TASK, "tiny")["peers"]
    assert "ratio" not in row
    assert row["decode_tokens_per_second"]["median"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [(["--geometry", "gpt-2"], "gpt-2"), (["-n", "0"], "-n"), (["--peers", "ghost"], "There is no peer ghost")],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], culprit: str) -> None:
    done = run([sys.executable, bench_peers.__file__, *arguments], text=True)
    assert done.returncode == 2
    assert culprit in done.stderr.splitlines()[-1]
