"""Engines that are refused while they are made, before and after others; the process ends with steps in flight."""

import gc
from pathlib import Path
from sys import path

path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

from tiny_models import tiny_geometry  # noqa: E402

from numba_atomflow import Engine  # noqa: E402
from numba_atomflow.errors import BackendError  # noqa: E402

REFUSED = tiny_geometry(post_norm=True)  # by the persistent kernel


def refuse() -> None:
    try:
        Engine.random(REFUSED, "cuda", 64, decode="persistent")
    except BackendError as error:
        print(error)
    gc.collect()


def main() -> Engine:
    refuse()
    with Engine.random(REFUSED, "cuda", 64, decode="graph") as engine:
        engine.feed([1, 2, 3])
        refuse()
        engine.feed([4])
    refuse()
    Engine.random(tiny_geometry(), "cpu", 64).close()
    engine = Engine.random(tiny_geometry(), "cuda", 64)
    next(engine.generate_tokens([1, 2, 3]))  # more steps are queued
    print("all is well")
    return engine


if __name__ == "__main__":
    kept = main()  # closed by the interpreter
