"""Our engine, with random weights; every token is read by the host before the next one."""

from protocol import Answer, Task, answer

from numba_atomflow import Engine, SamplingParams, __version__
from numba_atomflow.host.machine import commit


def measure(task: Task) -> Answer:
    """Time it."""
    params = SamplingParams(max_tokens=task.decode_tokens + 1, ignore_eos=True)
    with Engine.random(task.geometry, "cpu" if task.device == "cpu" else "auto", task.positions) as engine:
        stats = []
        for _ in range(task.repeats + 1):
            engine.reset()
            stats.append(engine.generate_tokens(task.prompt(), params).finish().stats)
        what = f"numba-atomflow {__version__} ({commit() or 'installed'}), {engine.backend.name}, FP8"
    return Answer(what, [turn.ttft for turn in stats[1:]], [turn.tpot for turn in stats[1:]])


if __name__ == "__main__":
    answer(measure)
