"""What it costs to give LLVM's pages back after loading: CPU time of one thread, with and without (Linux).

    python scripts/release_cost.py
    python scripts/release_cost.py MODEL --turns 15 --prompt 512 --json

Processes take turns, each a start with compiled kernels: loading, decode steps, a prompt whose kernels are loaded for
it, the same prompt again, and decode steps again. Printed are the medians of both kinds and, of their ratio in a turn,
the median with its 10th and 90th percentile.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from numba_atomflow.backends.cpu import backend
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.errors import AtomFlowError
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render

STEPS = 64  # decode steps of a measurement


def measure(model: str, prompt: int, release: bool) -> dict[str, float]:
    """Seconds of CPU time of each phase in this process, which has loaded no model yet."""
    from numba_atomflow import Engine, SamplingParams

    if not release:
        vars(backend)["release_library_pages"] = lambda: None
    seconds: dict[str, float] = {}

    def timed(name: str, do: Callable[[], object], units: int = 1) -> None:
        started = time.thread_time()
        do()
        seconds[name] = (time.thread_time() - started) / units

    def decode() -> None:
        engine.reset()
        engine.generate_tokens([1], SamplingParams(max_tokens=STEPS, ignore_eos=True, speculate="off")).finish()

    def read_prompt() -> None:
        engine.reset()
        engine.feed([i % engine.geometry.vocabulary for i in range(prompt)])

    started = time.thread_time()
    engine = Engine.load(model, "cpu", prompt + STEPS, threads=1)
    seconds["loading"] = time.thread_time() - started
    with engine:
        timed("a decode step", decode, STEPS)
        timed("the first prompt", read_prompt)
        timed("the same again", read_prompt)
        timed("a decode step after it", decode, STEPS)
    return seconds


def in_turns(model: str, prompt: int, turns: int) -> dict[bool, list[dict[str, float]]]:
    """Measurements of new processes, with and without the release; the one before the first is not counted."""
    measured: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for turn in range(-1, turns):
        for release in (True, False) if turn % 2 else (False, True):
            kind = "with" if release else "without"
            command = [sys.executable, __file__, model, "--prompt", str(prompt), "--child", kind]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if run.returncode:
                raise SystemExit(run.returncode)  # it has said why
            if turn >= 0:
                measured[release].append(json.loads(run.stdout))
    return measured


def main() -> int:
    """Parse options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="a checkpoint, by name or path")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    parser.add_argument("--child", choices=["with", "without"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not Path("/proc/self/smaps").exists():
        parser.error("This system has no /proc/self/smaps, so nothing is given back; run it on Linux.")
    if min(options.prompt, options.turns) < 1:
        parser.error("--prompt and --turns must be at least 1.")
    if options.child:
        try:
            print(json_text(measure(options.model, options.prompt, options.child == "with")))
        except AtomFlowError as error:
            print(f"release_cost: {error}", file=sys.stderr)
            return 2
        return 0
    measured = in_turns(options.model, options.prompt, options.turns)
    if options.json:
        print(json_text({"with": measured[True], "without": measured[False]}))
        return 0
    rows = []
    for phase in measured[True][0]:
        kept, released = (np.array([turn[phase] for turn in measured[kind]]) for kind in (False, True))
        low, middle, high = np.percentile(released / kept, [10, 50, 90])
        ms = [f"{1e3 * float(np.median(values)):.1f}" for values in (kept, released)]
        rows.append([phase, *ms, f"{middle:.3f} ({low:.3f}-{high:.3f})"])
    print(render("table", ["CPU time of", "kept, ms", "given back, ms", "ratio"], rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
