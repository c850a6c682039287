"""Batches, as far as they need no Ray: rows, the plan of shards, the folder of results, and the code of an actor."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_runner import InProcess, assert_refused
from tiny_models import names_in, tiny_geometry, write_checkpoint

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.batch import cluster, generate_batch, perplexity_batch
from numba_atomflow.batch import rows as batch_rows
from numba_atomflow.batch.folder import BatchFolder, read_results
from numba_atomflow.batch.rows import Row, read_rows
from numba_atomflow.batch.shards import plan_shards
from numba_atomflow.batch.tasks import EngineOptions, GenerateTask, PerplexityTask, ValidateTask
from numba_atomflow.batch.worker import Worker, batch_item
from numba_atomflow.checkpoint.fingerprint import identify
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.errors import BackendError, DestinationError, OptionError, TextError
from numba_atomflow.perf.perplexity import measure

TASK = GenerateTask({"max_tokens": 4, "ignore_eos": True})
ONE_THREAD = EngineOptions(backend="cpu", threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tiny_geometry(layers=1))


def row(line: int, **fields: Any) -> Row:
    return Row(line, line, fields)


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\n\n{"prompt": "y"}\r\n{"id": 7, "prompt": "\xc3\xa9"}')
    assert read_rows(path) == [
        Row(1, "a", {"prompt": "x"}),
        Row(3, 3, {"prompt": "y"}),
        Row(4, 7, {"prompt": "é"}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"id": true, "prompt": "x"}', "id is True"),
        (b'{"id": 1.5, "prompt": "x"}', "id is 1.5"),
        (b'{"prompt": "x", "prompt": "y"}', "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b'{"id": "a"}', "is also that of row 1"),
    ],
)
def test_a_malformed_row_carries_its_error(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": "a", "prompt": "x"}\n' + text + b'\n{"id": "c", "prompt": "z"}\n')
    good, bad, other = read_rows(path)
    assert (good.error, other.error, bad.line) == (None, None, 2)
    assert bad.error is not None
    assert message in bad.error


@pytest.mark.parametrize("source", ["in.jsonl", b"{}", {"prompt": "x"}, 5, [], [{"prompt": object()}], [5]])
def test_what_is_no_list_of_rows(source: Any) -> None:
    with pytest.raises(OptionError):
        read_rows(source)


def test_a_malformed_row_takes_no_id_from_another(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": 0, "prompt": "x"}\n{\n{"id": 2, "prompt": "y"}\n')  # numbered from 0: row 2 is line 3
    assert [(found.id, found.error is None) for found in read_rows(path)] == [(0, True), (None, False), (2, True)]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        read_rows(tmp_path / "in.jsonl")


# --- the plan ----------------------------------------------------------------------------------------------------


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_rows, "MOST_LINE_BYTES", 1 << 20)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b" " * (1 << 20) + b"\n")
    with pytest.raises(TextError, match=r"^Line 2 of .*in.jsonl has more than 1 MiB; write one JSON object on each"):
        read_rows(path)
    endless = Path("/dev/zero")
    if endless.exists():
        with pytest.raises(TextError, match=r"^Line 1 of /dev/zero"):
            read_rows(endless)


def test_rows_with_a_common_prefix_follow_each_other() -> None:
    rows = [row(1, prompt="b 1"), row(2, prompt="a 1"), row(3, prompt="b 0"), row(4, prompt="a 1"), row(5, prompt="a")]
    plan = plan_shards(rows, TASK, rows_per_shard=2)
    assert [[row.line for row in shard] for shard in plan.shards] == [[5, 2], [4, 3], [1]]
    assert plan.refused == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no prompt"),
        ({"prompt": "x", "messages": []}, "two"),
        ({"prompt": 5}, "prompt is 5"),
        ({"promt": "x"}, "unknown field 'promt'"),
        ({"prompt": "x", "params": 3}, "params is 3"),
        ({"prompt": "x", "params": {"temprature": 1}}, "no field 'temprature'"),
        ({"prompt": "x", "params": {"temperature": -1}}, "temperature is -1"),
        ({"prompt": "x", "constraint": {"xml": ""}}, "give one of"),
        ({"prompt": "x", "template_variables": {"a": 1}}, "for `messages`"),
    ],
)
def test_a_row_that_cannot_run_is_refused_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    plan = plan_shards([row(1, **fields), row(2, prompt="x")], TASK, 1)
    assert [[row.line for row in shard] for shard in plan.shards] == [[2]]
    (refused,) = plan.refused
    assert refused.error is not None
    assert message in refused.error


def test_fields_of_the_other_tasks() -> None:
    assert PerplexityTask().prepare({"text": "x"}) == ValidateTask().prepare({"prompt": "x"}) == "x"
    with pytest.raises(OptionError, match="unknown field 'prompt'"):
        PerplexityTask().prepare({"prompt": "x"})
    with pytest.raises(OptionError, match="prompt is ''"):
        ValidateTask().prepare({"prompt": ""})


# --- the folder --------------------------------------------------------------------------------------------------

IDENTITY = {"format_version": 1, "rows": "1", "model": "2", "task": {"stop": ("a",)}, "rows_per_shard": 2}


def result(line: int) -> dict[str, Any]:
    return {"line": line, "id": line, "error": None}


def test_a_folder_is_continued_and_finished_in_the_order_of_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    with BatchFolder(out, IDENTITY) as folder:
        folder.add_shard(1, [result(4), result(1)])
    (out / "shards" / ".partial-1-00").write_text("what a killed program left")
    with BatchFolder(out, IDENTITY) as folder:
        assert folder.finished_shards() == {1}
        folder.add_shard(0, [result(2)])
        assert not folder.finished
        folder.finish([result(3)])
        assert folder.finished
    assert [found["line"] for found in read_results(out / "results.jsonl")] == [1, 2, 3, 4]
    assert names_in(out) == ["batch.json", "lock", "results.jsonl"]


@pytest.mark.parametrize(("key", "what"), [("rows", "rows differ"), ("model", "model differs"), ("task", "task")])
def test_the_folder_of_another_batch_is_refused(tmp_path: Path, key: str, what: str) -> None:
    with BatchFolder(tmp_path / "out", IDENTITY):
        pass
    with pytest.raises(DestinationError, match=what):
        BatchFolder(tmp_path / "out", IDENTITY | {key: "other"})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DestinationError, match="is not empty"):
        BatchFolder(tmp_path, IDENTITY)
    with pytest.raises(DestinationError, match="cannot be written"):
        BatchFolder(tmp_path / "thesis.tex", IDENTITY)
    assert names_in(tmp_path) == ["thesis.tex"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with BatchFolder(tmp_path / "out", IDENTITY), pytest.raises(DestinationError, match="Another program"):
        BatchFolder(tmp_path / "out", IDENTITY)
    with BatchFolder(tmp_path / "out", IDENTITY):  # the lock ends with its program
        pass


def test_what_a_program_leaves_that_is_killed_at_once_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    (tmp_path / ".partial-1-00").write_text("{")
    with BatchFolder(tmp_path, IDENTITY):
        assert names_in(tmp_path) == ["batch.json", "lock", "shards"]


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text("{")
    with pytest.raises(DestinationError, match="damaged"):
        BatchFolder(tmp_path, IDENTITY)


# --- an actor ----------------------------------------------------------------------------------------------------


def fingerprint(model: Path) -> str:
    with Checkpoint.open(model) as checkpoint:
        return identify(checkpoint).fingerprint


def run(worker: Worker, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The results of a shard, as Ray passes it to an actor and back."""
    item = batch_item(3, rows)
    answer = worker({name: [value] for name, value in item.items()})
    assert (answer["number"][0], answer["failure"][0]) == (3, "")
    found: list[dict[str, Any]] = json.loads(answer["results"][0])
    assert [(each["line"], each["id"]) for each in found] == [(row.line, row.id) for row in rows]
    return found


@pytest.fixture(scope="module")
def worker(model: Path) -> Worker:
    return Worker(str(model), fingerprint(model), TASK, ONE_THREAD)


def test_replies_are_those_of_an_engine_and_share_prefixes(worker: Worker, model: Path) -> None:
    rows = [
        row(1, prompt="a common prefix and x"),
        row(2, prompt="a common prefix and y", params={"max_tokens": 2, "logprobs": 1, "prompt_logprobs": 0}),
        row(3, messages=[{"role": "user", "content": "hi"}], params={"temperature": 1, "seed": 5}),
        row(4, prompt=[5, 6, 7]),
    ]
    first, second, third, fourth = run(worker, rows)
    with Engine.load(model, "cpu", threads=1) as engine:
        reply = engine.generate("a common prefix and x", SamplingParams(max_tokens=4, ignore_eos=True)).finish()
        assert (first["text"], first["finish_reason"]) == (reply.text, "max_tokens")
    assert [each["tokens"] for each in (first, second, third, fourth)] == [4, 2, 4, 4]
    assert [len(second["logprobs"]), len(second["prompt_logprobs"])] == [2, second["prompt_tokens"]]
    assert fourth["prompt_tokens"] == 3
    assert run(worker, rows[:1]) == [first]  # whatever ran before
    shared = run(worker, [rows[0], row(2, prompt="a common prefix and y")])[1]
    assert shared["reused_tokens"] == len("a common prefix and ")


def test_a_row_that_the_model_cannot_take_has_an_error_and_no_other_has(worker: Worker) -> None:
    rows = [
        row(1, prompt="x"),
        row(2, prompt="x" * 9999),
        row(3, prompt=[5, 99999]),
        row(4, messages=[{"role": 5}]),
        row(5, prompt=""),
        row(6, prompt="x"),
    ]
    found = run(worker, rows)
    assert [each["line"] for each in found if each["error"]] == [2, 3, 4, 5]
    assert "context" in found[1]["error"]
    assert found[0]["text"] == found[5]["text"]


@dataclass(frozen=True)
class Failing:
    """A task that raises an error for some rows."""

    error: type[Exception]

    def prepare(self, row: Mapping[str, Any]) -> str:
        return ""

    def run(self, engine: Engine, row: Mapping[str, Any]) -> dict[str, Any]:
        if row["fails"]:
            raise self.error("what went wrong")
        return {"text": engine.generate("x", SamplingParams(max_tokens=1)).finish().text}

    def to_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("error", [BackendError, KeyError])
def test_an_engine_that_fails_is_replaced_and_the_next_rows_run(model: Path, error: type[Exception]) -> None:
    worker = Worker(str(model), fingerprint(model), Failing(error), ONE_THREAD)
    found = run(worker, [row(1, fails=True), row(2, fails=False)])
    assert "what went wrong" in found[0]["error"]
    assert found[1]["error"] is None


def test_a_machine_with_another_model_says_so(model: Path) -> None:
    worker = Worker(str(model), "0" * 64, TASK, ONE_THREAD)
    answer = worker({"number": [0], "rows": ["[]"]})
    assert "other weights" in answer["failure"][0]
    missing = Worker("no-such-model", "0" * 64, TASK, ONE_THREAD)
    assert "no-such-model" in missing({"number": [0], "rows": ["[]"]})["failure"][0]


def test_perplexity_of_a_row(model: Path) -> None:
    worker = Worker(str(model), fingerprint(model), PerplexityTask(context=16), ONE_THREAD)
    found, short = run(worker, [row(1, text="the text to be measured"), row(2, text="")])
    with Engine.load(model, "cpu", threads=1) as engine:
        expected = measure(engine, "the text to be measured", context=16)
    assert (found["perplexity"], found["tokens"]) == (expected.perplexity, expected.tokens)
    assert short["error"]


# --- the pool of actors ------------------------------------------------------------------------------------------


def pool_of(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], actors: int | None = None, **engine: Any
) -> cluster.Pool:
    """The pool for 100 shards on a cluster with these resources."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: resources))
    return cluster.choose_pool(cluster.ActorOptions("auto", actors), EngineOptions(**engine), shards=100)


def test_one_actor_for_each_gpu_or_for_each_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = {"CPU": 64.0, "GPU": 8.0}
    assert pool_of(monkeypatch, gpus) == (8, 1, 1, EngineOptions("cuda"))
    assert pool_of(monkeypatch, gpus, actors=2) == (2, 1, 1, EngineOptions("cuda"))
    assert pool_of(monkeypatch, gpus, backend="cpu") == (64, 0, 1, EngineOptions("cpu", threads=1))
    assert pool_of(monkeypatch, gpus, threads=6) == (10, 0, 6, EngineOptions("cpu", threads=6))
    assert pool_of(monkeypatch, {"CPU": 500.0}).size == 100  # no more than shards


def test_a_cluster_with_too_few_gpus_or_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="0 GPUs, and the batch needs 1"):
        pool_of(monkeypatch, {"CPU": 4.0}, backend="cuda")
    with pytest.raises(BackendError, match="4 shares of 1 CPU cores, and the batch needs 5"):
        pool_of(monkeypatch, {"CPU": 4.0}, actors=5)
    with pytest.raises(OptionError, match="actors is 0"):
        pool_of(monkeypatch, {"CPU": 4.0}, actors=0)


def test_a_ray_that_does_not_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*arguments: object, **options: object) -> None:
        raise Exception("the node timed out\nduring startup")  # noqa: TRY002 - as Ray does

    stopped: list[bool] = []
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setitem(
        sys.modules,
        "ray",
        SimpleNamespace(init=init, is_initialized=lambda: False, shutdown=lambda: stopped.append(True)),
    )
    for address, message in (("local", "does not start on this machine"), ("auto", "no Ray at 'auto'")):
        with (
            pytest.raises(BackendError, match=rf"{message} \(the node timed out during startup\)"),
            cluster.connected(cluster.ActorOptions(address)),
        ):
            pass
    assert stopped == [True, True, True]  # a local one is started twice


# --- a batch without Ray: shards run here, one after the other ----------------------------------------------------


class Cluster:
    """What `numba_atomflow.batch.cluster` does, in this process.

    Attributes:
        ran: lines of the rows of each shard that ran.
        interrupted_after: shards after which Ctrl-C comes.
        deadly: the line of a row that ends the process of its shard.
    """

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self._worker = worker
        self.ran: list[list[int]] = []
        self.interrupted_after: int | None = None
        self.deadly = 0
        monkeypatch.setattr(cluster, "check_ray", lambda: None)
        monkeypatch.setattr(cluster, "connected", lambda options: nullcontext())
        monkeypatch.setattr(cluster, "choose_pool", lambda *arguments: cluster.Pool(1, 0, 1, ONE_THREAD))
        monkeypatch.setattr(cluster, "run_shards", self.run_shards)

    def run_shards(
        self, shards: Sequence[tuple[int, Sequence[Row]]], *arguments: object
    ) -> Iterator[cluster.ShardResults]:
        for number, rows in reversed(shards):
            if len(self.ran) == self.interrupted_after:
                raise KeyboardInterrupt
            self.ran.append([row.line for row in rows])
            if self.deadly not in self.ran[-1]:
                yield cluster.ShardResults(number, run(self._worker, rows))


@pytest.fixture
def fake(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(worker, monkeypatch)


PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
ROWS: list[dict[str, Any]] = [{"id": f"{i}", "prompt": f"{i % 2} {i}"} for i in range(7)]


def test_an_interrupted_batch_continues(tmp_path: Path, model: Path, fake: Cluster) -> None:
    fake.interrupted_after = 2
    with pytest.raises(KeyboardInterrupt):
        generate_batch(ROWS, tmp_path / "out", model, PARAMS, rows_per_shard=2)
    assert names_in(tmp_path / "out" / "shards") == ["000002.jsonl", "000003.jsonl"]
    fake.interrupted_after = None
    report = generate_batch(ROWS, tmp_path / "out", model, PARAMS, rows_per_shard=2)
    assert sorted(fake.ran) == [[1, 3], [2, 4], [5, 7], [6]]
    assert (report.rows, report.errors, report.shards, report.resumed_shards, report.tokens) == (7, 0, 4, 2, 28)
    assert [result["id"] for result in report.results()] == [row["id"] for row in ROWS]
    again = generate_batch(ROWS, tmp_path / "out", model, PARAMS, rows_per_shard=2)
    assert (len(fake.ran), again.actors, again.resumed_shards) == (4, 0, 4)
    with pytest.raises(DestinationError, match="task or its parameters"):
        generate_batch(ROWS, tmp_path / "out", model, SamplingParams(max_tokens=5), rows_per_shard=2)
    longer = EngineOptions(max_seq_len=32)  # a row that did not fit would, or the reverse
    with pytest.raises(DestinationError, match="length of the context"):
        generate_batch(ROWS, tmp_path / "out", model, PARAMS, engine=longer, rows_per_shard=2)


def test_the_row_that_ends_its_process_is_found(tmp_path: Path, model: Path, fake: Cluster) -> None:
    fake.deadly = 3
    report = generate_batch(ROWS, tmp_path / "out", model, PARAMS, rows_per_shard=4)
    assert (report.rows, report.errors) == (7, 1)
    errors = [result["error"] for result in report.results()]
    assert [bool(error) for error in errors] == [line == 3 for line in range(1, 8)]
    assert "died" in errors[2]


def test_perplexity_of_all_texts_together(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(Worker(str(model), fingerprint(model), PerplexityTask(), ONE_THREAD), monkeypatch)
    report = perplexity_batch([{"text": "one text"}, {"text": "and another one"}, {"text": 5}], tmp_path / "out", model)
    first, second, third = report.results()
    tokens = first["tokens"] + second["tokens"]
    nats = sum(math.log(each["perplexity"]) * each["tokens"] for each in (first, second))
    assert report.tokens == tokens
    assert report.perplexity == pytest.approx(math.exp(nats / tokens))
    assert third["error"]


@pytest.mark.slow
def test_validation_of_a_row(model: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[validate]'")
    worker = Worker(str(model), fingerprint(model), ValidateTask(decode_steps=2), ONE_THREAD)
    good, long = run(worker, [row(1, prompt="a prompt"), row(2, prompt="x" * 9999)])
    assert (good["passed"], good["prompt_tokens"], good["positions"]) == (True, 8, 10)
    assert good["verdict"].startswith("PASS")
    assert long["error"]


# --- the command line --------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_ray_starts(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    cli = InProcess(capsys)
    rows = tmp_path / "in.jsonl"
    assert_refused(cli("batch", "run", rows, tmp_path / "out", "-m", model), rows)
    rows.write_text("\n")
    assert_refused(cli("batch", "run", rows, tmp_path / "out", "-m", model), "no rows")
    rows.write_text('{"prompt": "x"}\n')
    assert_refused(cli("batch", "run", rows, tmp_path / "out", "-m", tmp_path / "no-model"), "no-model")
    assert_refused(cli("batch", "run", rows, tmp_path, "-m", model), tmp_path)
    assert_refused(
        cli("batch", "run", rows, tmp_path / "out", "-m", model, "--rows-per-shard", "0"), "--rows-per-shard"
    )
    assert_refused(cli("batch", "run", rows, tmp_path / "out", "-m", model, "--top-p", "2"), "--top-p")
    assert not (tmp_path / "out").exists()


def test_what_the_commands_print(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli, rows = InProcess(capsys), tmp_path / "in.jsonl"
    Cluster(Worker(str(model), fingerprint(model), TASK, ONE_THREAD), monkeypatch)
    rows.write_text('{"prompt": "a text"}\n{"prompt": 5}\n')
    outcome = cli("batch", "run", rows, tmp_path / "replies", "-m", model)
    assert outcome.code == 0
    assert "2, 1 of them with an error" in outcome.out
    assert "6 tokens" in outcome.out
    rows.write_text('{"text": "a text"}\n')
    Cluster(Worker(str(model), fingerprint(model), PerplexityTask(), ONE_THREAD), monkeypatch)
    outcome = cli("batch", "perplexity", rows, tmp_path / "perplexities", "-m", model)
    assert outcome.code == 0
    assert "\nperplexity  " in outcome.out
    rows.write_text('{"prompt": 5}\n')
    assert cli("batch", "validate", rows, tmp_path / "validations", "-m", model).code == 1  # a row has an error


def test_a_batch_of_refused_rows_alone_starts_no_ray(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    rows = tmp_path / "in.jsonl"
    rows.write_text('{"id": "a"}\n{"id": "b", "prompt": 1}\n')
    outcome = InProcess(capsys)("batch", "run", rows, tmp_path / "out", "-m", model, "--json")
    assert outcome.code == 0
    report = json.loads(outcome.out)
    assert [report[key] for key in ("rows", "errors", "shards", "actors")] == [2, 2, 0, 0]
    assert [each["id"] for each in read_results(Path(report["path"]))] == ["a", "b"]
