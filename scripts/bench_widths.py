"""The time of CPU steps of several tokens, as a ratio to that of a decode step.

    python scripts/bench_widths.py                                         # the demo model
    python scripts/bench_widths.py my-model.safetensors --widths 1,2,4,8 --positions 0,500,2000 --threads 1

Widths take turns, so that other load on the machine affects all alike. Times are CPU time of the process, divided by
its threads, in the fastest of the turns: on a machine with other load, the wall time says little. Threads that wait do
not spin (OMP_WAIT_POLICY), or waiting would count as work.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before numba starts its threads

import numpy as np
from number_lists import list_of

from numba_atomflow import AtomFlowError, Engine
from numba_atomflow.backends.base import Backend
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.host.machine import commit, machine_record
from numba_atomflow.utils.json_text import json_text
from numba_atomflow.utils.tables import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table or JSON; the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.positions) < 0 or min(given.widths) < 1 or given.repeats < 1:
        parser.error("--positions are 0 or more, --widths and --repeats 1 or more")
    try:
        with Engine.load(given.model, "cpu", max(given.positions) + max(given.widths), given.threads) as engine:
            if max(given.widths) > engine.backend.verification.width:
                parser.error(f"--widths are at most {engine.backend.verification.width}")
            tokens = np.random.default_rng(0).integers(0, engine.geometry.vocabulary, engine.max_seq_len).tolist()
            engine.feed(tokens)
            seconds = {at: _step_seconds(engine.backend, tokens, at, given) for at in given.positions}
            device = engine.backend.device
    except AtomFlowError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        record: dict[str, Any] = {"machine": machine_record(), "commit": commit(), "device": device, "seconds": seconds}
        print(json_text(record))
        return 0
    print(f"{device}\n\nmilliseconds of CPU time per step and thread, and the ratio to a decode step")
    rows = [[str(at), *(_cell(times, width) for width in given.widths)] for at, times in seconds.items()]
    print(render("table", ["position", *(f"{width} tokens" for width in given.widths)], rows), end="")
    return 0


def _step_seconds(backend: Backend, tokens: list[int], position: int, given: argparse.Namespace) -> dict[int, float]:
    """Seconds of a step by width: the least of all turns."""
    least = dict.fromkeys((1, *given.widths), float("inf"))
    threads = getattr(backend, "threads", 1)
    for _ in range(given.repeats):
        for width in least:
            backend.seek(position)
            started = time.process_time()
            backend.verify(tokens[position : position + width])
            least[width] = min(least[width], (time.process_time() - started) / threads)
    return least


def _cell(times: dict[int, float], width: int) -> str:
    return f"{times[width] * 1e3:.2f} ({times[width] / times[1]:.2f})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--widths", type=list_of(int, "1,2,4"), default=[1, 2, 4, 8])
    parser.add_argument("--positions", type=list_of(int, "1,2,4"), default=[0, 500, 2000])
    parser.add_argument("--threads", type=int)
    parser.add_argument("-r", "--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="print a record")
    return parser


if __name__ == "__main__":
    sys.exit(main())
