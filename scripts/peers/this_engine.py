"""Our engine, with random weights; every token is read by the host before the next one.

On a CPU the weights are in a checkpoint, which it maps, as it does with a model of a user's.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol import Answer, PeakMemory, Task, answer

from numba_atomflow import Engine, SamplingParams, __version__
from numba_atomflow.host.machine import commit


@contextmanager
def open_engine(task: Task) -> Iterator[Engine]:
    """The engine, for a prompt and a reply."""
    prefill = task.options.get("prefill", "auto")
    if task.device != "cpu":
        with Engine.random(task.geometry, "auto", task.positions, task.threads, prefill=prefill) as engine:
            yield engine
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.safetensors"
        program = Path(__file__).with_name("random_checkpoint.py")
        subprocess.run([sys.executable, program, task.to_json(), file], check=True)
        with Engine.load(file, "cpu", task.positions, task.threads, prefill=prefill) as engine:
            yield engine


def measure(task: Task) -> Answer:
    """Time it."""
    params = SamplingParams(max_tokens=task.decode_tokens + 1, ignore_eos=True, speculate="off")
    with open_engine(task) as engine, PeakMemory() as memory:
        stats = []
        for _ in range(task.repeats + 1):
            engine.reset()
            stats.append(engine.generate_tokens(task.prompt(), params).finish().stats)
        what = f"numba-atomflow {__version__} ({commit() or 'installed'}), {engine.backend.name}, FP8"
        if engine.backend.prefill_path:
            what += f", prefill {engine.backend.prefill_path.name}"
    turns = stats[1:]
    return Answer(what, [turn.ttft for turn in turns], [turn.tpot for turn in turns], memory.total, memory.private)


if __name__ == "__main__":
    answer(measure)
