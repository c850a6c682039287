"""The measurement of prompts: which cases run, within which time, and what the tables say of them."""

import io
import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import bench_prefill
import pytest
from child_processes import run
from prefill_bench import report, worker
from prefill_bench.cases import MODELS, PARTS, PEER, Case, Measured, select
from prefill_bench.expectations import predicted_seconds, target_ratio, target_seconds, ttft_seconds
from prefill_bench.run import Budget, Record, run_cases
from prefill_bench.worker import Answer, Worker, serve

from numba_atomflow.model.presets import PRESETS

QKV = Case("projections", "llama-3.2-3b", "qkv", 512)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_every_part_has_cases_and_they_survive_json() -> None:
    cases = select(PARTS)
    assert {case.part for case in cases} == set(PARTS)
    assert len(set(cases)) == len(cases)
    assert all(Case(**json.loads(json.dumps(case.to_dict()))) == case for case in cases)


def test_an_engine_is_loaded_once_and_peers_come_last() -> None:
    cases = select(("ttft", "requests", "decode"))
    loads = [(case.model, case.subject) for case in cases if case.subject != PEER]
    changes = sum(a != b for a, b in itertools.pairwise(loads))
    assert changes == len(set(loads)) - 1
    first_peer = next(i for i, case in enumerate(cases) if case.subject == PEER)
    assert all(case.subject == PEER for case in cases[first_peer:])


def test_selections() -> None:
    cases = select(("projections",), ("llama-3.1-8b",), subjects=("o", "down"), tokens=(16, 512), variants=True)
    assert {(case.model, case.subject, case.tokens) for case in cases} == {
        ("llama-3.1-8b", kind, tokens) for kind in ("o", "down") for tokens in (16, 512)
    }
    assert all(case.variants for case in cases)
    assert {case.subject for case in select(("decode",), paths=("fp8",))} == {"fp8"}
    assert max(case.tokens for case in select(("ttft",), paths=("gemv",))) == 4096


# --- a run -----------------------------------------------------------------------------------------------------------


class Script:
    """Answers as they are written down; every case takes ten seconds."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.seconds, self.closed = list(answers), 0.0, False
        self.limits: list[float] = []

    def measure(self, case: Case, limit: float) -> Answer:
        self.limits.append(limit)
        self.seconds += 10
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed = True

    def clock(self) -> float:
        return self.seconds


LIMITS = {"kernels": 60.0, "engine": 100.0, "peer": 200.0}
GOOD = Answer(Measured({"ours": [1e-5]}, flop=1e9))


def run_script(
    script: Script, cases: list[Case], seconds: float = 1000, parts: dict[str, float] | None = None
) -> dict[str, list[dict[str, object]]]:
    record = Record(None, {})
    budget = Budget(seconds, parts, script.clock)
    run_cases(cases, script, budget, record, LIMITS, lambda _: None, script.clock)
    assert script.closed
    return record.data


def test_the_budget_of_the_run_and_of_a_part_ends_it() -> None:
    cases = [Case("projections", tokens=i) for i in range(5)] + [Case("decode", tokens=i) for i in range(3)]
    data = run_script(Script(*[GOOD] * 8), cases, 52, {"projections": 22})
    assert [row["case"]["tokens"] for row in data["rows"]] == [0, 1, 0, 1, 2]
    assert [row["tokens"] for row in data["not_run"]] == [2, 3, 4]


def test_no_case_may_take_longer_than_what_is_left() -> None:
    script = Script(*[GOOD] * 2)
    run_script(script, [QKV, QKV], 65)
    assert script.limits == [60.0, 55.0]


def test_after_three_failures_in_a_row_the_rest_of_a_kind_is_left_out() -> None:
    bad, others = Answer(None, "wrong"), [Case("attention", tokens=1)]
    script = Script(bad, bad, GOOD, bad, bad, bad, GOOD)
    data = run_script(script, [QKV] * 8 + others)
    assert len(data["rows"]) == 7
    assert [row["reason"] for row in data["not_run"]] == ["the 3 cases before it failed: wrong"] * 2
    assert data["rows"][-1]["case"]["part"] == "attention"


def test_the_record_is_complete_after_every_case(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    class Stops(Script):
        def measure(self, case: Case, limit: float) -> Answer:
            if not self.answers:
                raise KeyboardInterrupt
            return super().measure(case, limit)

    script = Stops(GOOD)
    with pytest.raises(KeyboardInterrupt):
        run_cases([QKV, QKV], script, Budget(100, clock=script.clock), Record(path, {}), LIMITS, print, script.clock)
    assert script.closed
    assert len(json.loads(path.read_text())["rows"]) == 1


# --- the worker ------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time, json
for line in sys.stdin:
    tokens = json.loads(line)["tokens"]
    if tokens == 1: sys.exit(7)
    if tokens == 2: time.sleep(1000)
    print("not for the answers", file=sys.stderr)
    lost = tokens == 3
    print(json.dumps({"measured": None if lost else {"flop": tokens}, "failure": "lost" if lost else "", "lost": lost}),
          flush=True)
"""


def test_a_worker_that_ends_hangs_or_loses_the_gpu_is_started_again(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    process = Worker(log, (sys.executable, "-c", PROGRAM))
    try:
        assert process.measure(Case("x", tokens=5), 60).measured == Measured(flop=5)
        assert "exit code 7" in process.measure(Case("x", tokens=1), 60).failure
        assert process.measure(Case("x", tokens=6), 60).measured == Measured(flop=6)
        hanging = process.measure(Case("x", tokens=2), 0.5)
        assert hanging == Answer(None, "no answer within 0 s", lost=True)
        assert process.measure(Case("x", tokens=3), 60) == Answer(None, "lost", lost=True)
        assert process.measure(Case("x", tokens=7), 60).measured == Measured(flop=7)
    finally:
        process.close()
    assert log.read_text().count("not for the answers") == 4


def test_every_lab_has_a_process_of_its_own(tmp_path: Path) -> None:
    program = "import os, json\nfor line in iter(input, None): print(json.dumps(ANSWER), flush=True)"
    program = program.replace("ANSWER", '{"measured": {"flop": os.getpid()}, "failure": "", "lost": False}')
    process = Worker(tmp_path / "worker.log", (sys.executable, "-c", program))
    try:
        cases = [QKV, Case("attention"), Case("ttft", subject="gemm"), Case("decode"), Case("requests", subject=PEER)]
        answers = [process.measure(case, 60).measured for case in cases]
    finally:
        process.close()
    first, second, third, fourth, fifth = (answer.flop for answer in answers if answer)
    assert first == second != third == fourth != fifth


class DriverError(Exception):
    """Has the name of the error that the driver's calls raise."""


def test_errors_are_answers_and_an_error_of_the_gpu_ends_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(case: Case) -> Measured:
        if case.tokens == 1:
            raise ValueError("one\nline")
        if case.tokens == 2:
            raise DriverError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return Measured({"ours": [1.0]}, errors={"ours": 1e-6})

    requests = [json.dumps(Case("x", tokens=i).to_dict()) for i in (0, 1, 2, 0)]
    answers = io.StringIO()
    serve(measure, requests, answers)
    first, second, third = (json.loads(line) for line in answers.getvalue().splitlines())
    assert Measured.from_dict(first["measured"]) == measure(Case("x"))
    assert (second["failure"], second["lost"]) == ("ValueError: one line", False)
    assert (third["failure"], third["lost"]) == ("DriverError: CUDA_ERROR_ILLEGAL_ADDRESS", True)
    assert "measure" in capsys.readouterr().err


def test_every_case_has_a_module() -> None:
    labs = {case.lab for case in select(PARTS)}
    assert labs == {"kernels", "engine", "peer"}
    for name in labs - {"kernels"}:  # which opens the GPU
        assert hasattr(worker.open_lab(name), "measure")


# --- tables ----------------------------------------------------------------------------------------------------------

MACHINE = {"cpu": "a CPU", "nvidia_driver": "580", "commit": "abc"}


def record_of(*rows: tuple[Case, Measured | None]) -> dict[str, object]:
    entries = [
        {"case": case.to_dict(), "measured": measured and asdict(measured), "failure": "" if measured else "why"}
        for case, measured in rows
    ]
    return {"machine": MACHINE, "date": "today", "rows": entries, "not_run": []}


def test_a_projection_is_compared_round_by_round() -> None:
    sides = {"cuBLAS": [2e-5, 4e-5, 6e-5], "ours": [1e-5, 4e-5, 5e-5], "tile 64": [3e-5] * 3, "tile 128": [2e-5] * 3}
    measured = Measured(sides, 2e9, {"ours": 2e-7, "tile 64": 3e-7}, notes={"plan": "tile 256"})
    text = report.tables(record_of((QKV, measured)), "md")
    row = next(line for line in text.splitlines() if "qkv" in line)
    assert "| 50 | 50 | 40.0 (16.0-48.0) | 1.20 (1.04-1.84) | 0.95 met |" in row
    assert "tile 256; tile 128 20.0; tile 64 30.0 |" in row
    assert "2.0e-07, tile 64 3.0e-07" in row
    assert "WRONG" not in text


def test_a_wrong_result_is_said(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = Record(path, {"machine": MACHINE, "date": "today"})
    measured = Measured({"ours": [1e-5], "tile 64": [1e-5]}, 1e9, {"ours": math.nan, "tile 64": 0.5})
    record.add({"case": QKV.to_dict(), "measured": asdict(measured), "failure": "", "took": 1})
    assert "WRONG: ours, WRONG: tile 64" in report.tables(json.loads(path.read_text()), "md")
    assert bench_prefill.main(["--read", str(path)]) == 1


def test_ceilings_and_decode_speed() -> None:
    ceilings = Measured(values={"TMA, GB/s": 4500.4}, notes={"GPU": "NVIDIA H200"})
    decode = Measured({"tpot": [0.001, 0.002, 0.002]}, notes={"path": "persistent"})
    case = Case("decode", "llama-3.2-3b", "gemm", 16)
    text = report.tables(record_of((Case("ceilings"), ceilings), (case, decode)), "md")
    assert "| GPU | NVIDIA H200 |" in text
    assert "| TMA, GB/s | 4500 |" in text
    assert "| 500.0 (500.0-833.3) | 2.000 (1.200-2.000) | persistent |" in text


def test_a_missed_target_is_said() -> None:
    case = Case("ttft", "llama-3.2-3b", "gemm", 512)
    text = report.tables(record_of((case, Measured({"ttft": [8e-3], "back to back": [9e-3]}))), "table")
    assert "7 MISSED" in text
    assert "9.00 (9.00-9.00)" in text
    assert f"{1e3 * (predicted_seconds(case) or 0):.2f}" in text


def test_requests_are_compared_with_the_peer() -> None:
    ours, theirs = (Case("requests", "llama-3.1-8b", name, 512) for name in ("gemm", PEER))
    seconds = {"ttft": [0.01], "tpot": [0.002], "total": [0.3]}
    text = report.tables(record_of((ours, Measured(seconds)), (theirs, Measured(seconds | {"total": [0.6]}))), "md")
    assert "| 300.0 (300.0-300.0) | 10.00 (10.00-10.00) | 500 | 2.00 (2.00-2.00) |" in text


def test_what_failed_and_what_was_not_run_is_said() -> None:
    record = record_of((QKV, None))
    record["not_run"] = [QKV.to_dict() | {"reason": "no time left"}] * 2
    text = report.tables(record, "table")
    assert "failed: projections llama-3.2-3b qkv 512: why" in text
    assert "not run: 2 of projections: no time left" in text
    assert "TFLOP/s" not in text  # no empty table


# --- predictions -----------------------------------------------------------------------------------------------------


def test_the_cost_model_is_close_to_the_experiments_with_single_kernels() -> None:
    """us of all four projections of a layer with the best tile, as measured on an H200 (docs/prompts.md)."""
    measured = {("llama-3.2-3b", 16): 41, ("llama-3.2-3b", 64): 46, ("llama-3.2-3b", 128): 60}
    measured |= {("llama-3.2-3b", 2048): 561, ("llama-3.2-3b", 4096): 1116}
    measured |= {("llama-3.1-8b", 16): 74, ("llama-3.1-8b", 2048): 1218, ("llama-3.1-8b", 4096): 2531}
    for (model, tokens), us in measured.items():
        cases = [Case("projections", model, kind, tokens) for kind in ("qkv", "o", "gate_up", "down")]
        predicted = sum(1e6 * (predicted_seconds(case) or 0) for case in cases)
        assert predicted == pytest.approx(us, rel=0.12), (model, tokens)


def test_longer_prompts_take_longer_and_fp8_is_faster() -> None:
    for model in MODELS:
        times = [ttft_seconds(PRESETS[model], tokens) for tokens in (16, 64, 512, 2048, 4096, 32768)]
        assert times == sorted(times)
        assert ttft_seconds(PRESETS[model], 4096, fp8=True) < times[4]


def test_targets() -> None:
    assert target_seconds(Case("ttft", "llama-3.1-8b", "fp8", 4096)) == 62e-3
    assert target_seconds(Case("ttft", "llama-3.1-8b", "gemv", 4096)) is None
    assert target_ratio(QKV) == 0.95
    assert target_ratio(Case("projections", "llama-3.2-3b", "qkv", 128)) is None
    assert target_ratio(Case("attention", "llama-3.2-1b", "causal", 512)) is None


# --- the command line ------------------------------------------------------------------------------------------------


def test_parts_with_seconds() -> None:
    assert bench_prefill.parse_parts(["ttft:20", "decode"]) == (["ttft", "decode"], {"ttft": 20.0})
    assert bench_prefill.parse_parts([]) == (list(PARTS), {})


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["ghosts"], "There is no part ghosts"),
        (["ttft:soon"], "write ttft:120"),
        (["--models", "gpt-2"], "There is no gpt-2"),
        (["--tokens", "many"], "--tokens many"),
        (["decode", "--tokens", "3"], "No case is left"),
        (["--budget", "0"], "--budget"),
        (["--read", "/nonexistent.json"], "/nonexistent.json cannot be read"),
        (["--compile", "nine"], "--compile nine"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        bench_prefill.main(arguments)
    assert raised.value.code == 2
    assert culprit in capsys.readouterr().err.splitlines()[-1]


def test_a_record_is_read_back_and_what_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    record = Record(path, {"machine": MACHINE, "date": "today"})
    record.add({"case": QKV.to_dict(), "measured": asdict(Measured({"ours": [1e-5]}, 1e9)), "failure": "", "took": 1})
    assert bench_prefill.main(["--read", str(path), "--format", "md"]) == 0
    assert "llama-3.2-3b qkv" in capsys.readouterr().out
    path.write_text('{"format": "another"}')
    with pytest.raises(SystemExit):
        bench_prefill.main(["--read", str(path)])


def test_predictions_are_printed_as_a_script() -> None:
    done = run([sys.executable, bench_prefill.__file__, "--predictions"], text=True)
    assert done.returncode == 0
    assert "llama-3.1-8b" in done.stdout
