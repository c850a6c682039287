"""A checkpoint with random weights, and the CPU's kernels compiled: what a user has after the first start.

Its arguments are a task as JSON and the file to write. It runs in a process of its own: what generating weights and
compiling leave in memory is not part of what the engine needs.
"""

import json
import sys
from pathlib import Path

from protocol import Task

from numba_atomflow import Engine
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.checkpoint.writer import CheckpointWriter
from numba_atomflow.geometry import ModelGeometry


def write(path: Path, geometry: ModelGeometry) -> None:
    """Write the checkpoint."""
    model = RandomModel(geometry)
    source = json.loads(model.metadata["source"])
    with CheckpointWriter(path, geometry, model.text, {}, source) as writer:
        for name in model.names():
            writer.write(name, model.array(name))


if __name__ == "__main__":
    task, file = Task.from_json(sys.argv[1]), Path(sys.argv[2])
    write(file, task.geometry)
    with Engine.load(file, "cpu", task.positions, task.threads) as engine:
        engine.warm_up()
