"""Our engine, with random weights; every token is read by the host before the next one."""

from protocol import Answer, Task, answer, peak_memory

from numba_atomflow import Engine, SamplingParams, __version__
from numba_atomflow.host.machine import commit


def measure(task: Task) -> Answer:
    """Time it."""
    params = SamplingParams(max_tokens=task.decode_tokens + 1, ignore_eos=True, speculate="off")
    backend, prefill = "cpu" if task.device == "cpu" else "auto", task.options.get("prefill", "auto")
    with Engine.random(task.geometry, backend, task.positions, task.threads, prefill=prefill) as engine:
        stats = []
        for _ in range(task.repeats + 1):
            engine.reset()
            stats.append(engine.generate_tokens(task.prompt(), params).finish().stats)
        what = f"numba-atomflow {__version__} ({commit() or 'installed'}), {engine.backend.name}, FP8"
        if engine.backend.prefill_path:
            what += f", prefill {engine.backend.prefill_path.name}"
    return Answer(what, [turn.ttft for turn in stats[1:]], [turn.tpot for turn in stats[1:]], peak_memory())


if __name__ == "__main__":
    answer(measure)
