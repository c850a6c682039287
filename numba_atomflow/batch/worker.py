"""What runs in each process of a batch: one engine, and shard after shard."""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from numba_atomflow.batch.rows import Row
from numba_atomflow.batch.tasks import EngineOptions, Task
from numba_atomflow.checkpoint.fingerprint import identify
from numba_atomflow.engine import Engine
from numba_atomflow.errors import AtomFlowError, BackendError, CheckpointError, ClosedError
from numba_atomflow.utils.json_text import json_text

_NEW_ENGINE_AFTER = (BackendError, CheckpointError, ClosedError)  # errors that are the engine's, not the row's


def batch_item(number: int, rows: Sequence[Row]) -> dict[str, Any]:
    """A shard as it travels to a process: rows as JSON, because their fields may have any types."""
    records = [{"line": row.line, "id": row.id, "fields": row.fields} for row in rows]
    return {"number": number, "rows": json.dumps(records)}


class Worker:
    """A class for `ray.data.Dataset.map_batches`: a batch is one shard.

    Args:
        model: a checkpoint file, or the name of one in the models folder, on the machine where this runs.
        fingerprint: of the model's weights (`checkpoint.fingerprint`).
        task: what is done with each row.
        options: how the engine is made.
    """

    def __init__(self, model: str, fingerprint: str, task: Task, options: EngineOptions) -> None:
        self._model, self._fingerprint = model, fingerprint
        self._task, self._options = task, options
        self._failure = ""  # why this process runs no shard
        try:
            self._engine = self._load()
        except AtomFlowError as error:
            self._fail(error)

    def _load(self) -> Engine:
        engine = Engine.load(self._model, **asdict(self._options))
        if identify(engine.checkpoint).fingerprint != self._fingerprint:
            engine.close()
            raise CheckpointError(
                f"{engine.checkpoint.path} has other weights than the model of that name where the batch began; "
                "copy that file here."
            )
        return engine

    def _fail(self, error: AtomFlowError) -> None:
        self._failure = f"{error} (On {socket.gethostname()}.)"

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Run a shard: its number, its results as JSON, and why this process runs none ("" if it does)."""
        results = []
        if not self._failure:
            self._engine.reset()  # the results of a shard depend on nothing that ran before
            try:
                results = [self._run(row) for row in json.loads(batch["rows"][0])]
            except CheckpointError as error:
                self._fail(error)
        return {
            "number": np.asarray(batch["number"]),
            "results": np.array([json_text(results)], dtype=object),
            "failure": np.array([self._failure], dtype=object),
        }

    def _run(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The result of a row, after a second attempt with a new engine if the first one fails.

        Raises:
            CheckpointError: the model cannot be loaded any more.
        """
        begin = {"line": row["line"], "id": row["id"], "error": None}
        message = ""
        for _ in range(2):
            try:
                return begin | self._task.run(self._engine, row["fields"])
            except _NEW_ENGINE_AFTER as error:
                message = str(error)
                self._replace_engine()
            except AtomFlowError as error:
                return begin | {"error": str(error)}
            except Exception as error:  # a row must not end the run
                self._engine.reset()
                return begin | {
                    "error": f"This is a bug in numba-atomflow ({type(error).__name__}: {error}); report it."
                }
        return begin | {"error": message}

    def _replace_engine(self) -> None:
        """A new engine in place of one that failed.

        Where a GPU cannot be used by this process any more, the process ends; Ray starts another one for the shard.
        """
        try:
            self._engine.close()
            self._engine = self._load()
        except BackendError:
            os._exit(1)  # Python's own exit would wait for the GPU
