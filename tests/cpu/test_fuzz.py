"""The fuzz harness: it finds planted faults, minimises them, and finds none in the program."""

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
from fuzzing import minimise, targets, worker
from fuzzing.mutate import mutate
from fuzzing.worker import Outcome

CORPUS = Path(__file__).parents[1] / "corpus"
SEEDS, SHARE = (1, 2, 3), 60  # fixed seeds, and cases of each; then one more
SECONDS = 5


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fuzz.Fuzzer]:
    with fuzz.Fuzzer(0, tmp_path_factory.mktemp("findings"), list(targets.USES)) as fuzzer:
        yield fuzzer


def restart(fuzzer: fuzz.Fuzzer, seed: int) -> fuzz.Report:
    fuzzer.report = fuzz.Report(seed, outcomes={name: fuzz.Counter() for name in targets.USES})
    return fuzzer.report


def test_valid_files_work(fuzzer: fuzz.Fuzzer) -> None:
    for target, bases in fuzzer.bases.items():
        for files in bases:
            assert fuzzer.run(target, files) == Outcome("ok"), target


def test_a_short_run(fuzzer: fuzz.Fuzzer) -> None:
    """A few seconds of `scripts/fuzz.py`; the last seed is random."""
    until = time.monotonic() + SECONDS
    for seed in (*SEEDS, secrets.randbelow(2**32)):
        report = restart(fuzzer, seed)
        while report.cases < SHARE and (time.monotonic() < until or not report.cases):
            fuzzer.case(report.cases)
        found = [(finding.signature, finding.detail, finding.folder) for finding in report.findings.values()]
        assert not found, f"python scripts/fuzz.py --seed {seed} --count {report.cases}"


def test_a_case_is_a_function_of_seed_and_number(fuzzer: fuzz.Fuzzer) -> None:
    restart(fuzzer, 7)
    cases = [fuzzer.make(i) for i in range(30)]
    assert cases == [fuzzer.make(i) for i in range(30)]
    assert len({json.dumps([target, sorted(files)]) for target, files, _ in cases}) > 5
    assert sum(files != base for _, files, base in cases) >= 25  # a mutation may change nothing


FINDINGS = {
    "exception": "raise KeyError('a')",
    "sentence": "from numba_atomflow.errors import TextError; raise TextError('two\\nlines.')",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hang": "while True: pass",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> worker.Worker:
    """A worker whose only target runs the code in the folder's file ``code.py``."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "planted.py").write_text(
        "from fuzzing import worker\n"
        "import json, os, sys\nfrom dataclasses import asdict\nfrom pathlib import Path\n"
        "print('{}', flush=True)\n"
        "worker.limit_memory()\n"
        "for line in sys.stdin:\n"
        "    folder = Path(json.loads(line)['folder'])\n"
        "    run = lambda *_: exec((folder / 'code.py').read_text(), {})\n"
        "    print(json.dumps(asdict(worker.use(run, 'planted', folder, folder))), flush=True)\n"
    )
    monkeypatch.setattr(worker, "MODULE", "planted")
    monkeypatch.setenv("PYTHONPATH", str(package))
    return worker.Worker(tmp_path, limit=0.3)


def test_findings(planted: worker.Worker, tmp_path: Path) -> None:
    codes = FINDINGS | {
        "ok": "pass",
        "refused": "from numba_atomflow.errors import TextError; raise TextError('This is a sentence.')",
    }
    try:
        for kind, code in codes.items():
            (tmp_path / "code.py").write_text(code)
            outcome = planted.run("planted", tmp_path)
            assert outcome.kind == kind, outcome
            assert outcome.is_finding == (kind in FINDINGS)
        (tmp_path / "code.py").write_text("bytearray(20 << 30)")
        assert "MemoryError" in planted.run("planted", tmp_path).signature
    finally:
        planted.close()


def test_a_case_becomes_smaller() -> None:
    base = {"a.json": json.dumps({"x": 1, "y": [1, 2, 3]}).encode(), "b": bytes(1000), "c": b"sound"}
    files = {
        "a.json": json.dumps({"x": "bad", "y": [1, 2, 3], "z": {"w": "long" * 50}}).encode(),
        "b": bytes(500) + b"\1\2\3" + bytes(497),
        "c": b"other",
    }

    def fails(case: minimise.Files) -> bool:
        return b"bad" in case["a.json"] and case["b"][501] == 2

    small = minimise.minimise(files, base, fails)
    assert small == {"a.json": b"bad", "b": bytes(501) + b"\2" + bytes(498), "c": b"sound"}


def test_minimising_ends_after_so_many_runs() -> None:
    runs = []
    minimise.minimise({"a.json": b"[1]" * 500}, {"a.json": b"{}"}, lambda case: bool(runs.append(case)), runs=20)
    assert len(runs) == 20


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.safetensors", "a.gguf", "a.jinja", "a.npy"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", bytes(100), b"GGUF\3" + bytes(20), b"\xff" * 9])
def test_damaged_files_can_be_damaged_again(name: str, data: bytes) -> None:
    import random

    for seed in range(200):
        assert isinstance(mutate(random.Random(seed), name, data), bytes)


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in CORPUS.glob(f"*/{fuzz.CASE}")), ids=lambda path: path.name
)
def test_the_corpus(fuzzer: fuzz.Fuzzer, folder: Path) -> None:
    """Earlier findings stay fixed: an error of the same class, or success."""
    outcome = fuzzer.run(*fuzz.read_case(folder, fuzzer.bases))
    assert not outcome.is_finding, outcome
    assert (outcome.signature or "ok") == json.loads((folder / fuzz.CASE).read_text())["expected"]
