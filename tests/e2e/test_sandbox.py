"""The sandbox with SmolLM2 on the CPU: concurrent requests generate the same tokens as single ones."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import InProcess, assert_refused
from text_samples import PROMPTS

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.cli import sandbox_main
from numba_atomflow.sandbox.cpu_runner import CpuRunner
from numba_atomflow.sandbox.engine import Fork, ServingEngine
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import cache_sizes

TOKENS = 24


@pytest.fixture(scope="module")
def engine(smollm2_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(smollm2_checkpoint, "cpu", 256, threads=1) as engine:
        yield engine


def server(checkpoint: Path, blocks: int, block_size: int, sequences: int) -> ServingEngine:
    opened = Checkpoint.open(checkpoint)
    sizes = cache_sizes(opened.geometry, blocks, (block_size,), sequences)
    runner = CpuRunner(opened.geometry, dict(WeightArrays(opened)), sizes, threads=1)
    runner.prepare()
    return ServingEngine(runner)


def assert_same_as_alone(engine: Engine, served: list[Request]) -> None:
    for request in served:
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        assert request.output == engine.generate_tokens(list(request.prompt), params).finish().token_ids
        assert request.finish_reason == "max_tokens"


def test_eight_requests_with_a_fork_and_a_shared_prefix(engine: Engine, smollm2_checkpoint: Path) -> None:
    one = server(smollm2_checkpoint, blocks=200, block_size=8, sequences=9)
    requests = [Request(i, engine.text.encode(text), TOKENS) for i, text in enumerate(PROMPTS)]
    late = Request(8, [*requests[5].prompt, *engine.text.encode(" the")], 8, arrival=1e-3)
    served = one.serve([*requests, late], [Fork(100, 2, 9, engine.text.encode(" a dragon"), TOKENS)])
    assert len(served) == 10
    assert_same_as_alone(engine, served)
    assert late.shared_tokens == 8
    assert served[-1].shared_tokens > len(requests[2].prompt)
    assert one.manager.copies >= 1
    assert one.manager.free_count == 200


def test_too_few_blocks_force_preemptions_and_change_no_token(engine: Engine, smollm2_checkpoint: Path) -> None:
    one = server(smollm2_checkpoint, blocks=12, block_size=8, sequences=8)
    requests = [Request(i, engine.text.encode(text), TOKENS) for i, text in enumerate(PROMPTS)]
    served = one.serve(requests)
    assert sum(request.preemptions for request in served) >= 1
    assert_same_as_alone(engine, served)
    assert one.manager.free_count == 12


def test_ten_times_more_requests_than_blocks(engine: Engine, smollm2_checkpoint: Path) -> None:
    one = server(smollm2_checkpoint, blocks=4, block_size=16, sequences=4)
    requests = [Request(i, engine.text.encode(PROMPTS[i % len(PROMPTS)])[:5], 4) for i in range(40)]
    served = one.serve(requests)
    assert [len(request.output) for request in served] == [4] * 40
    assert_same_as_alone(engine, served[:8])


def test_the_command_serves_a_trace(cli: InProcess, smollm2_checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"prompt": "The capital of France is", "max_tokens": 8}\n\n'
        '{"id": 9, "arrival": 0.001, "tokens": [504, 3575], "max_tokens": 3}\n'
        '{"fork_of": 1, "after": 2, "prompt": " not", "max_tokens": 4, "id": 7}\n'
    )
    common = "sandbox", "run", smollm2_checkpoint, "--trace", trace, "--backend", "cpu", "--ignore-eos"
    outcome = cli(*common, "--json", "--block-size", 8)
    assert outcome.code == 0, outcome
    record = json.loads(outcome.out)
    assert [reply["id"] for reply in record["replies"]] == [1, 7, 9]
    assert [len(reply["token_ids"]) for reply in record["replies"]] == [8, 4, 3]
    assert record["tokens"] == 15
    assert record["throughput"] == pytest.approx(15 / record["seconds"])
    assert 0 < record["mean_utilisation"] <= record["peak_utilisation"] <= 1
    table = cli(*common)
    assert table.code == 0
    assert "3 requests, " in table.out


def test_a_console_script_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["numba-atomflow-sandbox"])
    with pytest.raises(SystemExit) as leave:
        sandbox_main()
    assert leave.value.code == 0
    out = capsys.readouterr().out
    assert "compare" in out
    monkeypatch.setattr("sys.argv", ["numba-atomflow-sandbox", "run", "--poisson", "-1"])
    with pytest.raises(SystemExit) as leave:
        sandbox_main()
    assert leave.value.code == 2


def test_the_command_serves_arrivals_at_random(cli: InProcess, tiny_checkpoint: Path) -> None:
    common = "sandbox", "run", tiny_checkpoint, "--poisson", 50, "--requests", 3, "--max-tokens", 3, "--backend"
    assert cli(*common, "cpu").code == 0
    outcome = cli(*common, "cpu", "--prompt-tokens", 20, "--common-tokens", 16, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["prompt_tokens"] == 60


def test_the_plots(cli: InProcess, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws: pip install '.[plot]'")
    run, comparison = tmp_path / "run.png", tmp_path / "comparison.svg"
    options = "--poisson", 50, "--requests", 2, "--max-tokens", 2
    assert cli("sandbox", "run", tiny_checkpoint, *options, "--backend", "cpu", "--plot", run).code == 0
    assert run.read_bytes()[:4] == b"\x89PNG"
    sizes = "--contexts", "8", "--step-contexts", "8", "--block-sizes", "8", "--batches", "1", "--repeats", 1
    outcome = cli("sandbox", "compare", tiny_checkpoint, *sizes, "--backend", "cpu", "--json", "--plot", comparison)
    assert outcome.code == 0, outcome
    assert "<svg" in comparison.read_text()
    refused = cli("sandbox", "run", tiny_checkpoint, *options, "--backend", "cpu", "--plot", tmp_path / "picture.xyz")
    assert_refused(refused, "picture.xyz")


def test_the_comparison(cli: InProcess, tiny_checkpoint: Path) -> None:
    sizes = "--contexts", "8,40", "--step-contexts", "24", "--block-sizes", "8,32", "--batches", "1,3"
    command = "sandbox", "compare", tiny_checkpoint, *sizes, "--backend", "cpu", "--repeats", 2
    outcome = cli(*command, "--json")
    assert outcome.code == 0, outcome
    record = json.loads(outcome.out)
    assert [(r["context"], r["block_size"]) for r in record["attention"]] == [(8, 8), (40, 8), (8, 32), (40, 32)]
    assert [(r["batch"], r["block_size"]) for r in record["steps"]] == [(1, 8), (3, 8), (1, 32), (3, 32)]
    for row in record["steps"]:
        assert row["wall_seconds"] > row["table_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["wall_seconds"])
        assert set(row["shares"]) == {"indirection", "page tables", "scheduling", "host"}


@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["run"], ["--trace FILE or --poisson RATE"]),
        (["run", "--poisson", "0"], ["--poisson"]),
        (["run", "--poisson", "1", "--block-size", "7"], ["--block-size is 7", "8, 16, 32, 64, 128"]),
        (["run", "--poisson", "1", "--blocks", "0"], ["--blocks is 0"]),
        (["run", "--poisson", "1", "--blocks", "1", "--max-tokens", "60"], ["Request 1", "shorter"]),
        (["run", "--trace", "no-such-file"], ["no-such-file"]),
        (["compare", "--batches", "9"], ["--batches"]),
        (["compare", "--contexts", "100000"], ["--contexts 100000"]),
        (["compare", "--block-sizes", "8,x"], ["--block-sizes 8,x"]),
    ],
)
def test_invalid_options(cli: InProcess, tiny_checkpoint: Path, arguments: list[str], culprits: list[str]) -> None:
    command, *rest = arguments
    assert_refused(cli("sandbox", command, tiny_checkpoint, *rest, "--backend", "cpu"), *culprits)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("nonsense", "Line 1"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "x", "speed": 1}', "unknown field speed"),
        ('{"tokens": []}', "there are none"),
        ('{"tokens": [99999999]}', "none of the model's"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "x", "fork_of": 3}', "there is no request 3"),
        ('{"prompt": "x", "arrival": -1}', "arrival"),
        ('{"prompt": "x", "arrival": 1e300}', "arrival"),
        ('{"prompt": "x", "arrival": true}', "arrival"),
        ('{"prompt": "x", "arrival": ' + "9" * 400 + "}", "arrival"),
        ('{"prompt": 5}', "prompt must be a text"),
        ('{"tokens": [true]}', "none of the model's"),
        ('{"tokens": ["5"]}', "none of the model's"),
        ('{"tokens": 5}', "there are none"),
        ('{"tokens": [Infinity]}', "none of the model's"),
        ('{"tokens": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "x", "id": ' + "9" * 5000 + "}", "5000 digits"),
        ('{"prompt": "x", "\\u001b[2J": 1}', r"unknown field \x1b[2J"),
        ('{"prompt": "x", "prompt": "y"}', "prompt is listed twice"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(
    cli: InProcess, tiny_checkpoint: Path, tmp_path: Path, line: str, fault: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(line + "\n")
    outcome = cli("sandbox", "run", tiny_checkpoint, "--trace", trace, "--backend", "cpu")
    assert_refused(outcome, str(trace), fault)
