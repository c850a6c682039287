"""Where the memory of a process on the CPU goes, step by step: imports, loading, decoding, a prompt (Linux).

    python scripts/memory_phases.py
    python scripts/memory_phases.py MODEL --prompt 2048 --format md

All figures are MB of 1,000,000 bytes: pages in memory; of them private ones, and those of mapped files (the system can
take these back, and processes share them); the proportional share of all; and the most so far. The first run compiles
kernels, which takes memory too: the second one is what later starts take.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from numba_atomflow.errors import AtomFlowError  # which imports nothing else


class Memory(NamedTuple):
    """Bytes of this process.

    Attributes:
        resident: all pages in memory. private: not of files. proportional: shared pages count in part.
        peak: of `resident`.
    """

    resident: int
    private: int
    proportional: int
    peak: int

    @classmethod
    def now(cls, process: Path = Path("/proc/self")) -> "Memory":
        """As the kernel counts it.

        Args:
            process: folder of the process.
        """
        lines = (process / "smaps_rollup").read_text().splitlines() + (process / "status").read_text().splitlines()
        values = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
        return cls(*(1024 * int(values[name][0]) for name in ("Rss", "Anonymous", "Pss", "VmHWM")))


def phases(model: str, prompt: int, threads: int | None) -> dict[str, Callable[[], object]]:
    """What is done, in order, and the function that does it."""
    engines = []

    def load() -> None:
        from numba_atomflow import Engine

        engines.append(Engine.load(model, "cpu", prompt + 16, threads))

    def run(count: int) -> None:
        from numba_atomflow import SamplingParams

        (engine,) = engines
        engine.reset()
        tokens = [i % engine.geometry.vocabulary for i in range(count)]
        engine.generate_tokens(tokens, SamplingParams(max_tokens=8, ignore_eos=True, speculate="off")).finish()

    return {
        "Python": lambda: None,
        "import numpy": lambda: importlib.import_module("numpy"),
        "import llvmlite": lambda: importlib.import_module("llvmlite.binding"),
        "import numba": lambda: importlib.import_module("numba"),
        "import numba_atomflow": lambda: importlib.import_module("numba_atomflow.engine"),
        "load": load,
        "decode 8 tokens": lambda: run(1),
        f"a prompt of {prompt}": lambda: run(prompt),
        "tokenizer": lambda: engines[0].text,
    }


def main() -> int:
    """Parse options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a checkpoint, by name or path")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default: 512)")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the engine's own choice)")
    parser.add_argument("--format", choices=["table", "md"], default="table")
    options = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        parser.error("This system has no /proc/self/smaps_rollup; run it on Linux 4.14 or later.")
    if options.prompt < 1:
        parser.error("--prompt must be at least 1.")
    measured: dict[str, Memory] = {}
    for name, do in phases(options.model, options.prompt, options.threads).items():
        try:
            do()
        except AtomFlowError as error:
            parser.error(str(error))
        measured[name] = Memory.now()
    from numba_atomflow.utils.tables import render  # not before: importing it takes memory

    headers = ["after", "resident", "private", "of files", "proportional", "peak"]
    rows = [
        [
            name,
            *(
                f"{size / 1e6:.0f}"
                for size in (now.resident, now.private, now.resident - now.private, now.proportional, now.peak)
            ),
        ]
        for name, now in measured.items()
    ]
    print(render("md" if options.format == "md" else "table", headers, rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
