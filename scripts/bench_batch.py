"""A batch on several processes against one process with the same CPU cores: throughput, start, memory.

    python scripts/bench_batch.py                    # 2,000 prompts on the demo model, as many actors as cores
    python scripts/bench_batch.py my-model.safetensors --prompts 200 --max-tokens 16 --json

Both run the same shards and must give the same replies. The start (Ray, and an engine in each process) is measured by a
batch of a row for each actor, and is not part of the speeds. On a busy machine compare CPU seconds, not tokens/s.
"""

import argparse
import sys
import tempfile
import threading
import time
from typing import Any, NamedTuple

import psutil
from number_lists import at_least

from numba_atomflow import AtomFlowError, SamplingParams
from numba_atomflow.batch import ActorOptions, EngineOptions, generate_batch
from numba_atomflow.batch.rows import read_rows
from numba_atomflow.batch.run import ROWS_PER_SHARD
from numba_atomflow.batch.shards import plan_shards
from numba_atomflow.batch.tasks import GenerateTask
from numba_atomflow.checkpoint.find import DEFAULT_MODEL, find_checkpoint
from numba_atomflow.engine import Engine
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.host.threads import default_threads
from numba_atomflow.utils.json_text import json_text

SUBJECTS = ("a river", "a small town", "the first railway", "an old clock", "winter", "a library", "bread", "the moon")


class Spent(NamedTuple):
    """What some work took: wall-clock and CPU seconds."""

    seconds: float
    cpu_seconds: float

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


class Watch(threading.Thread):
    """Time and memory of this process and its children, which are sampled: Ray's do not report to their parent.

    Attributes:
        pss, rss: memory of all actors together in bytes, when it is largest: what they share counted once, and counted
            for each.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.pss = self.rss = 0
        self._cpu: dict[int, float] = {}  # seconds of each process
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.5):
            pss = rss = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid] = times.user + times.system
                    if "MapWorker" in " ".join(process.cmdline()):
                        found = process.memory_full_info()
                        pss, rss = pss + found.pss, rss + found.rss
                except psutil.Error:
                    continue
            if pss > self.pss:
                self.pss, self.rss = pss, rss

    def now(self) -> Spent:
        return Spent(time.monotonic(), time.process_time() + sum(self._cpu.values()))

    def end(self) -> None:
        self._ended.set()
        self.join()


def prompts(count: int) -> list[dict[str, Any]]:
    """Questions in groups of 8 with a common beginning."""
    return [
        {"id": i, "prompt": f"Notes for issue {i // 8}. In one sentence about {SUBJECTS[i % 8]}:"} for i in range(count)
    ]


def in_one_process(
    watch: Watch, model: str, rows: list[dict[str, Any]], max_tokens: int, threads: int
) -> tuple[Spent, list[str]]:
    """The rows in the order of the batch, in this process; without the time to load the model."""
    task = GenerateTask({"max_tokens": max_tokens, "ignore_eos": True})
    replies: dict[int, str] = {}
    with Engine.load(model, "cpu", threads=threads) as engine:
        engine.warm_up()
        start = watch.now()
        for shard in plan_shards(read_rows(rows), task, ROWS_PER_SHARD).shards:
            engine.reset()
            for row in shard:
                replies[row.line] = task.run(engine, row.fields)["text"]
        return watch.now() - start, [replies[line] for line in sorted(replies)]


def in_a_batch(
    watch: Watch, model: str, rows: list[dict[str, Any]], max_tokens: int, actors: int, rows_per_shard: int
) -> tuple[Spent, list[str]]:
    """The rows over Ray, the start of Ray and of the engines included."""
    with tempfile.TemporaryDirectory() as folder:
        start = watch.now()
        report = generate_batch(
            rows,
            folder,
            model,
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            actors=ActorOptions(actors=actors, quiet=True),
            engine=EngineOptions(backend="cpu", threads=1),
            rows_per_shard=rows_per_shard,
        )
        return watch.now() - start, [result["text"] for result in report.results()]


def measure(model: str, count: int, max_tokens: int, actors: int) -> dict[str, Any]:
    """Figures of one run of each kind, JSON-ready."""
    rows, tokens = prompts(count), count * max_tokens
    watch = Watch()
    watch.start()
    alone, expected = in_one_process(watch, model, rows, max_tokens, actors)  # first: it compiles kernels
    start, _ = in_a_batch(watch, model, rows[:actors], max_tokens, actors, 1)
    whole, replies = in_a_batch(watch, model, rows, max_tokens, actors, ROWS_PER_SHARD)
    watch.end()
    work = whole - start
    return {
        "model": model,
        "prompts": count,
        "tokens": tokens,
        "actors": actors,
        "same_replies": sum(reply == other for reply, other in zip(replies, expected, strict=True)),
        "start": start._asdict(),
        "batch": work._asdict() | {"tokens_per_second": tokens / work.seconds},
        "one_process": alone._asdict() | {"tokens_per_second": tokens / alone.seconds},
        "speed_ratio": alone.seconds / work.seconds,
        "cpu_ratio": alone.cpu_seconds / work.cpu_seconds,
        "actors_pss_bytes": watch.pss,
        "actors_rss_bytes": watch.rss,
        "machine": machine_record(),
        "commit": commit(),
    }


def main() -> int:
    """Parse options, measure, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--prompts", type=at_least(1), default=2000)
    parser.add_argument("--max-tokens", type=at_least(1), default=16)
    parser.add_argument("--actors", type=at_least(1), default=default_threads(), help="and threads of the one process")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    try:
        find_checkpoint(options.model)
        found = measure(options.model, options.prompts, options.max_tokens, options.actors)
    except AtomFlowError as error:
        print(f"bench_batch: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json_text(found, indent=2))
        return 0
    for name in ("start", "batch", "one_process"):
        print(f"{name:<12}", ", ".join(f"{what} {value:.1f}" for what, value in found[name].items()))
    print(f"batch / one process: {found['speed_ratio']:.2f} by the clock, {found['cpu_ratio']:.2f} by CPU time")
    print(f"same replies {found['same_replies']} of {found['prompts']}")
    print(
        f"memory of all actors: {found['actors_pss_bytes'] / 1e6:.0f} MB; {found['actors_rss_bytes'] / 1e6:.0f} MB if "
        "what they share is counted for each"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
