"""Compile times: of a cold start, which compiles kernels, and of a warm one, which loads them from the cache.

Both are starts of a process of its own, with a compile cache that is empty at first.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_atomflow import home
from numba_atomflow.backends.base import Decode, Prefill
from numba_atomflow.backends.choose import BackendName
from numba_atomflow.engine import Engine
from numba_atomflow.errors import AtomFlowError, BackendError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.utils.progress import Progress

PROMPT_TOKENS = 9
REFUSED = 2  # exit code of a start that failed with an AtomFlowError


@dataclass(frozen=True)
class CompileTimes:
    """Seconds of compiling kernels, or of reading them from the cache, until a first short prompt is done."""

    cold: float
    warm: float


def measure_compile_times(
    model: Path | ModelGeometry,
    backend: BackendName = "auto",
    max_seq_len: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    *,
    decode: Decode = "auto",
    prefill: Prefill = "auto",
    prefill_chunk: int | None = None,
) -> CompileTimes:
    """Start twice: the kernels of a checkpoint, or of a model with random weights.

    Raises:
        BackendError: a start failed.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "max_seq_len": max_seq_len,
        "threads": threads,
        "decode": decode,
        "prefill": prefill,
        "prefill_chunk": prefill_chunk,
    }
    if isinstance(model, ModelGeometry):
        options["geometry"] = model.to_dict()
    else:
        options["path"] = str(model.resolve())
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for done, what in enumerate(("cold start", "warm start")):
            if progress:
                progress(what, done, 2)
            seconds.append(_start(options, Path(folder)))
    if progress:
        progress("warm start", 2, 2)
    return CompileTimes(*seconds)


def _start(options: dict[str, Any], folder: Path) -> float:
    environment = os.environ | {
        home.ENVIRONMENT_VARIABLE: str(folder),
        "CUDA_CACHE_PATH": str(folder / "driver"),  # the driver's cache of code compiled from PTX
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", __spec__.name, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode == REFUSED:
            raise BackendError(last)  # a complete sentence
        raise BackendError(f"A start to measure compile times failed ({last}); leave them out with --no-compile-times.")
    return float(done.stdout)


def _prompt_seconds(engine: Engine) -> float:
    """Seconds of a short prompt."""
    engine.reset()
    started = time.perf_counter()
    engine.feed([0] * min(PROMPT_TOKENS, engine.max_seq_len))
    return time.perf_counter() - started


def main() -> int:
    """Start once and print the seconds."""
    options = json.loads(sys.argv[1])
    geometry, path = options.pop("geometry", None), options.pop("path", None)
    try:
        if geometry:
            engine = Engine.random(ModelGeometry.from_dict(geometry), **options)
        else:
            engine = Engine.load(path, **options)
    except AtomFlowError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    with engine:
        first, second = (_prompt_seconds(engine) for _ in range(2))  # the first also compiles or loads kernels
        sys.stdout.write(f"{engine.compile_seconds + max(first - second, 0.0)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
