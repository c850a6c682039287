"""Batches over Ray: actors and drivers that are killed lose and double no row."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from child_processes import finish, run, wait_until
from cli_runner import command_line, environment
from tiny_models import tiny_geometry, write_checkpoint, write_json

from numba_atomflow import home
from numba_atomflow.batch.rows import read_rows
from numba_atomflow.batch.shards import plan_shards
from numba_atomflow.batch.tasks import EngineOptions, GenerateTask
from numba_atomflow.batch.worker import Worker, batch_item
from numba_atomflow.checkpoint.fingerprint import identify
from numba_atomflow.checkpoint.format import Checkpoint

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
pytestmark = pytest.mark.slow  # a start of Ray takes some ten seconds of CPU time

ROWS, ROWS_PER_SHARD = 64, 4
TASK = GenerateTask({"max_tokens": 200, "ignore_eos": True})

# A driver whose task ends its process at one row, as a row does that needs too much memory.
DRIVER = """
import json, os, sys
from pathlib import Path
from numba_atomflow.batch import ActorOptions, EngineOptions, GenerateTask
from numba_atomflow.batch.run import run_batch

class Deadly(GenerateTask):
    def run(self, engine, row):
        if row["prompt"] == "deadly":
            os.kill(os.getpid(), 9)
        return super().run(engine, row)

rows, out, model, params, rows_per_shard = sys.argv[1:]
task, actors, engine = Deadly(json.loads(params)), ActorOptions(actors=2, quiet=True), EngineOptions(backend="cpu")
report = run_batch(Path(rows), out, model, task, actors, engine, int(rows_per_shard))
print(json.dumps(report.to_dict()))
"""


@pytest.fixture
def ray_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Ray's files in a folder of the test: its token in the home folder, the rest where paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        yield environment(home.home(), HOME=str(tmp_path), RAY_TMPDIR=folder)


def expected(model: Path, rows: Path) -> list[dict[str, Any]]:
    """The results without Ray: shard after shard in this process, but for the rows that cannot run."""
    with Checkpoint.open(model) as checkpoint:
        worker = Worker(str(model), identify(checkpoint).fingerprint, TASK, EngineOptions(backend="cpu", threads=1))
    found: list[dict[str, Any]] = []
    for shard in plan_shards(read_rows(rows), TASK, ROWS_PER_SHARD).shards:
        item = batch_item(0, [row for row in shard if row.id != "deadly"])
        found += json.loads(worker({name: [value] for name, value in item.items()})["results"][0])
    return sorted(found, key=lambda result: result["line"])


def family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def actors(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    found = []
    for child in family(process):
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_killed_processes_lose_and_double_no_row(tmp_path: Path, ray_environment: dict[str, str]) -> None:
    """An actor is killed, then the driver; the next driver finishes, though one row kills every actor that runs it."""
    model, rows, out = write_checkpoint(tmp_path, tiny_geometry()), tmp_path / "in.jsonl", tmp_path / "out"
    records: list[dict[str, Any]] = [
        {"id": f"row {i}", "prompt": f"Group {i % 3} has a common beginning. {i}"} for i in range(ROWS)
    ]
    records[5] = {"id": "bad", "prompt": None}
    records[9] = {"id": "deadly", "prompt": "deadly"}  # the last in the order of prompts
    rows.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    command = [sys.executable, "-c", DRIVER, rows, out, model, json.dumps(TASK.params), str(ROWS_PER_SHARD)]

    def start() -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=ray_environment, stdout=pipe, stderr=pipe, text=True)

    def shards() -> int:
        return len(list(out.glob("shards/*.jsonl")))

    driver = start()
    wait_until(lambda: shards() >= 1, driver, "the first shard")
    actors(driver)[0].kill()
    before = shards()
    wait_until(lambda: shards() >= before + 4, driver, "shards that no actor had begun")
    left = family(driver)
    driver.kill()
    finish(driver)
    psutil.wait_procs(left)  # Ray's processes notice that the driver has ended
    kept = shards()

    driver = start()
    printed, err = finish(driver)
    assert driver.returncode == 0, err
    report = json.loads(printed)
    assert (report["rows"], report["errors"], report["resumed_shards"], report["actors"]) == (ROWS, 2, kept, 2)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [result["line"] for result in results] == list(range(1, ROWS + 1))
    assert "died" in results[9]["error"]
    assert "prompt is None" in results[5]["error"]
    same_shard = [row.id for row in plan_shards(read_rows(rows), TASK, ROWS_PER_SHARD).shards[-1]]
    assert "deadly" in same_shard  # whose rows ran one by one
    theirs = {result["id"]: result for result in expected(model, rows)}
    assert len(theirs) == ROWS - 2
    for result in results:
        if result["id"] in same_shard:  # alone, a prompt has another prefix hit, and with it other rounding
            assert result["id"] == "deadly" or (result["error"], result["tokens"]) == (None, TASK.params["max_tokens"])
        elif result["id"] != "bad":
            assert result == theirs[result["id"]]


def test_an_address_without_ray_is_refused(tmp_path: Path, ray_environment: dict[str, str]) -> None:
    model = write_checkpoint(tmp_path, tiny_geometry(layers=1))
    write_json(tmp_path / "in.jsonl", {"prompt": "x"})
    command = command_line("batch", "run", tmp_path / "in.jsonl", tmp_path / "out", "-m", model, "--address", "auto")
    done = run(command, env=ray_environment, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: There is no Ray at 'auto'")
    assert len(done.stderr.splitlines()) == 1
