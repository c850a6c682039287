"""Decode speed while other programs use the cores: tokens per second with 0, 1 and 2 competing processes.

    python scripts/bench_busy.py
    python scripts/bench_busy.py --llama-bench ~/llama.cpp/build/bin/llama-bench --rounds 5 --format md

The sides take turns, each in a process of its own with random weights: this engine; this engine on numba's OpenMP pool
(with NUMBA_THREADING_LAYER=omp), on one thread; and llama.cpp. A competing process computes all the time. The scheduler
shares cores between sessions before it does between processes (autogroups), so nothing else may run in this terminal.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).with_name("peers")))
from protocol import Answer, Task

from numba_atomflow import AtomFlowError
from numba_atomflow.host.machine import machine_record
from numba_atomflow.host.threads import choose_threads, default_threads
from numba_atomflow.model.presets import PRESETS, find_preset
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

PEERS = Path(__file__).with_name("peers")
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(10_000))"


@dataclass(frozen=True)
class Side:
    """What is measured: a script of scripts/peers, its threads, its options, and variables of its environment."""

    name: str
    script: str
    threads: int
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def all_sides(threads: int, llama_bench: str | None) -> list[Side]:
    """What takes turns."""
    openmp = {"NUMBA_THREADING_LAYER": "omp"}
    sides = [
        Side("this engine", "this_engine.py", threads),
        Side("numba's OpenMP pool", "this_engine.py", threads, environment=openmp),
        Side("one thread", "this_engine.py", 1),
    ]
    if llama_bench:
        sides.append(Side("llama.cpp", "llama_bench.py", threads, {"binary": llama_bench}))
    return sides


@contextmanager
def competitors(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that use a core each, until the block, or this process, ends."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(os.getpid())]) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def tokens_per_second(side: Side, task: Task) -> float:
    """The median of one process's turns.

    Raises:
        SystemExit: it failed; what it said was shown.
    """
    own_task = replace(task, threads=side.threads, options=side.options)
    command = [sys.executable, str(PEERS / side.script), own_task.to_json()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ | side.environment)
    if done.returncode:
        sys.exit(f"{side.name} failed with exit code {done.returncode}.")
    return 1 / median(Answer(**json.loads(done.stdout.strip().splitlines()[-1])).tpot)


def measure(sides: Sequence[Side], counts: Sequence[int], rounds: int, task: Task) -> dict[int, dict[str, float]]:
    """Median tokens per second of each side by the number of competing processes."""
    speeds: dict[int, dict[str, list[float]]] = {count: {side.name: [] for side in sides} for count in counts}
    for number in range(rounds):
        for count in counts:
            with competitors(count):
                for side in sides:
                    speed = tokens_per_second(side, task)
                    print(f"[{number + 1}/{rounds}] {count} competing, {side.name}: {speed:.1f} tok/s", file=sys.stderr)
                    speeds[count][side.name].append(speed)
    return {count: {name: median(turns) for name, turns in by_side.items()} for count, by_side in speeds.items()}


def report(speeds: dict[int, dict[str, float]], style: str) -> str:
    """A row for each number of competing processes, with each side's tokens per second."""
    names = list(next(iter(speeds.values())))
    rows = [[str(count), *(f"{by_side[name]:.1f}" for name in names)] for count, by_side in speeds.items()]
    return render("md" if style == "md" else "table", ["competing processes", *names], rows)


def main() -> int:
    """Parse options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="smollm2-135m", metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("-n", "--tokens", type=int, default=32, help="decode steps of a turn")
    parser.add_argument("-r", "--repeats", type=int, default=3, help="turns of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("-t", "--threads", type=int, default=default_threads(), help="of every side but one")
    parser.add_argument("--competing", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench")
    parser.add_argument("--format", choices=["table", "md", "json"], default="table")
    options = parser.parse_args()
    if min(options.tokens, options.repeats, options.rounds) < 1 or min(options.competing) < 0:
        parser.error("-n, -r and --rounds must be at least 1, and --competing at least 0.")
    if options.llama_bench and not shutil.which(options.llama_bench):
        parser.error(f"--llama-bench {options.llama_bench} is no program; give the path of llama.cpp's llama-bench.")
    try:
        choose_threads(options.threads)
        geometry = find_preset(options.geometry)
    except AtomFlowError as error:
        parser.error(str(error))
    task = Task(geometry, 8, options.tokens, options.repeats, "cpu")
    speeds = measure(all_sides(options.threads, options.llama_bench), options.competing, options.rounds, task)
    if options.format == "json":
        print(json_text({"tokens_per_second": speeds, "threads": options.threads, "machine": machine_record()}))
    else:
        print(report(speeds, options.format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
