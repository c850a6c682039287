"""A batch from its rows to a folder of results."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.batch import cluster
from numba_atomflow.batch.cluster import ActorOptions
from numba_atomflow.batch.folder import BatchFolder, Result, read_results
from numba_atomflow.batch.rows import Row, read_rows
from numba_atomflow.batch.shards import Plan, plan_shards
from numba_atomflow.batch.tasks import EngineOptions, GenerateTask, PerplexityTask, Task, ValidateTask
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.checkpoint.fingerprint import identify
from numba_atomflow.checkpoint.format import Checkpoint
from numba_atomflow.errors import OptionError
from numba_atomflow.files.untrusted import quote
from numba_atomflow.sampling import SamplingParams
from numba_atomflow.utils.arguments import whole_number

ROWS_PER_SHARD = 16
_FORMAT_VERSION = 1

Rows = Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class BatchReport:
    """What a batch did.

    Attributes:
        path: of the file of results, a JSON object on each line, in the order of the rows.
        rows: in all; errors: those without a result.
        shards: in all, resumed_shards: of them, those that an earlier run had finished.
        actors: processes that ran; 0 if all was finished.
        prompt_tokens, reused_tokens, tokens: of all rows; reused: found in the KV cache; tokens: generated or scored.
        seconds: of this run, the start of Ray and of the engines included.
        tokens_per_second: tokens of this run's shards per second.
        perplexity: of all texts together, if that is what was measured.
        failed: rows that were validated and did not pass.
    """

    path: Path
    rows: int
    errors: int
    shards: int
    resumed_shards: int
    actors: int
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    seconds: float
    tokens_per_second: float
    perplexity: float | None
    failed: int

    def results(self) -> Iterator[Result]:
        """Every row's result: `line`, `id`, `error` (None, or a sentence), and what the task gives."""
        return read_results(self.path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"path": str(self.path)}


def generate_batch(
    rows: Rows,
    out: Path | str,
    model: str | Path = DEFAULT_MODEL,
    params: SamplingParams | None = None,
    *,
    actors: ActorOptions | None = None,
    engine: EngineOptions | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> BatchReport:
    """A reply for each row, on all GPUs or CPU cores of this machine or of a Ray cluster.

    If the folder holds a part of the same batch, the rest is computed.

    Args:
        rows: the Path of a JSON Lines file, or mappings; docs/batch.md has the fields.
        out: the folder of the results.
        model: a checkpoint file, or the name of one in the models folder; on a cluster, the same on every machine.
        params: for rows that have none of their own; without a constraint, which rows give.
        actors: where the batch runs.
        engine: how each process loads the model.
        rows_per_shard: rows that are computed in one process one after the other, and stored together.

    Raises:
        OptionError: there are no rows, an option is out of range, or Ray is not installed.
        TextError: the file of rows cannot be read.
        CheckpointError: no such checkpoint, or a damaged one.
        DestinationError: the folder cannot be written, or holds something else.
        BackendError: there is no Ray at the address, or a process cannot run the model.
    """
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise OptionError(f"params is {quote(params)}; give SamplingParams(...), or nothing.")
    if params.constraint is not None:
        raise OptionError("params has a constraint; give it in each row, as constraint.")
    given = {field.name: getattr(params, field.name) for field in fields(params) if field.name != "constraint"}
    return run_batch(rows, out, model, GenerateTask(given), actors, engine, rows_per_shard)


def perplexity_batch(
    rows: Rows,
    out: Path | str,
    model: str | Path = DEFAULT_MODEL,
    context: int | None = None,
    stride: int | None = None,
    *,
    actors: ActorOptions | None = None,
    engine: EngineOptions | None = None,
) -> BatchReport:
    """The perplexity of each row's `text`; arguments and errors are those of `generate_batch` and `perplexity`."""
    engine = engine or EngineOptions()
    if engine.max_seq_len is None:
        engine = replace(engine, max_seq_len=context)
    return run_batch(rows, out, model, PerplexityTask(context, stride), actors, engine, rows_per_shard=1)


def validate_batch(
    rows: Rows,
    out: Path | str,
    model: str | Path = DEFAULT_MODEL,
    decode_steps: int = 32,
    *,
    actors: ActorOptions | None = None,
    engine: EngineOptions | None = None,
) -> BatchReport:
    """Every layer on each row's `prompt`, against transformers; arguments and errors are those of `generate_batch`."""
    return run_batch(rows, out, model, ValidateTask(decode_steps), actors, engine, rows_per_shard=1)


def run_batch(
    rows: Rows,
    out: Path | str,
    model: str | Path,
    task: Task,
    actors: ActorOptions | None,
    engine: EngineOptions | None,
    rows_per_shard: int,
) -> BatchReport:
    """Any task; arguments and errors are those of `generate_batch`."""
    started = time.monotonic()
    engine = engine or EngineOptions()
    cluster.check_ray()
    rows_per_shard = whole_number("rows_per_shard", rows_per_shard)
    if rows_per_shard < 1:
        raise OptionError(f"rows_per_shard is {quote(rows_per_shard)}; it must be 1 or more.")
    all_rows = read_rows(rows)
    plan = plan_shards(all_rows, task, rows_per_shard)
    path = find_checkpoint(model)
    with Checkpoint.open(path) as checkpoint:
        fingerprint = identify(checkpoint).fingerprint
    identity = {
        "format_version": _FORMAT_VERSION,
        "rows": _digest(all_rows),
        "model": fingerprint,
        "task": task.to_dict(),
        "rows_per_shard": rows_per_shard,
        "max_seq_len": engine.max_seq_len,
    }
    # A name is looked up on each machine; a path may be relative to this process's folder.
    name = str(model) if path.parent == home.models() else str(path.absolute())
    with BatchFolder(Path(out), identity) as folder:
        batch = _Batch(folder, plan, task, name, fingerprint)
        if not folder.finished:
            batch.run(actors or ActorOptions(), engine)
        folder.drop_shards()
        return batch.report(time.monotonic() - started)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.line, row.id, row.fields, row.error], sort_keys=True).encode())
    return digest.hexdigest()


class _Batch:
    """A batch in its folder."""

    def __init__(self, folder: BatchFolder, plan: Plan, task: Task, model: str, fingerprint: str) -> None:
        self._folder, self._plan = folder, plan
        self._task, self._model, self._fingerprint = task, model, fingerprint
        self._resumed = len(plan.shards) if folder.finished else len(folder.finished_shards())
        self._actors = 0
        self._tokens = 0  # of this run

    def run(self, actors: ActorOptions, engine: EngineOptions) -> None:
        """Run the shards that are missing, and write the file of all results."""
        if len(self._folder.finished_shards()) < len(self._plan.shards):
            with cluster.connected(actors):
                pool = cluster.choose_pool(actors, engine, len(self._missing()))
                self._actors = pool.size
                self._run_missing(pool)
        self._folder.finish({"line": row.line, "id": row.id, "error": row.error} for row in self._plan.refused)

    def _missing(self) -> list[tuple[int, list[Row]]]:
        finished = self._folder.finished_shards()
        return [(number, rows) for number, rows in enumerate(self._plan.shards) if number not in finished]

    def _run_missing(self, pool: cluster.Pool) -> None:
        for number, results in self._run(self._missing(), pool):
            self._folder.add_shard(number, results)
        for number, rows in self._missing():  # its processes died: find the row at which they do
            found = dict(self._run([(place, [row]) for place, row in enumerate(rows)], pool))
            died = "The process that ran this row died each time; see whether its machine has too little memory."
            self._folder.add_shard(
                number,
                [
                    found.get(place, [{"line": row.line, "id": row.id, "error": died}])[0]
                    for place, row in enumerate(rows)
                ],
            )

    def _run(self, shards: Sequence[tuple[int, Sequence[Row]]], pool: cluster.Pool) -> Iterator[cluster.ShardResults]:
        for shard in cluster.run_shards(shards, pool, self._model, self._fingerprint, self._task):
            self._tokens += sum(result.get("tokens", 0) for result in shard.results)
            yield shard

    def report(self, seconds: float) -> BatchReport:
        """The sums over all results, which are finished."""
        totals = dict.fromkeys(("prompt_tokens", "reused_tokens", "tokens"), 0)
        rows = errors = failed = 0
        loss = 0.0
        for result in read_results(self._folder.results_path):
            rows += 1
            errors += result["error"] is not None
            failed += result.get("passed") is False
            for key in totals:
                totals[key] += result.get(key, 0)
            loss += result.get("nats") or 0.0
        return BatchReport(
            path=self._folder.results_path,
            rows=rows,
            errors=errors,
            shards=len(self._plan.shards),
            resumed_shards=self._resumed,
            actors=self._actors,
            **totals,
            seconds=seconds,
            tokens_per_second=self._tokens / seconds,
            perplexity=_perplexity(loss, totals["tokens"]) if isinstance(self._task, PerplexityTask) else None,
            failed=failed,
        )


def _perplexity(nats: float, tokens: int) -> float | None:
    """e^(nats / tokens); None if that is beyond float64, or there are no tokens."""
    return math.exp(nats / tokens) if tokens and nats / tokens < 709 else None
