"""A process that forks with an engine on the GPU: the child is refused, ends as usual, and the parent goes on."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

from tiny_models import tiny_geometry  # noqa: E402

from numba_atomflow import Engine, SamplingParams  # noqa: E402
from numba_atomflow.errors import AtomFlowError  # noqa: E402

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def in_the_child(engine: Engine) -> None:
    for use in (lambda: engine.feed([1]), lambda: Engine.random(tiny_geometry(), "cuda", 64)):
        try:
            use()
        except AtomFlowError as error:
            print(error, flush=True)
        else:
            sys.exit("the child used its parent's GPU")


def main() -> None:
    engine = Engine.random(tiny_geometry(), "cuda", 64)
    expected = engine.generate_tokens([1, 2, 3], PARAMS).finish().token_ids
    child = os.fork()
    if child == 0:
        in_the_child(engine)
        return
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"the child ended with {status}")
    engine.reset()
    if engine.generate_tokens([1, 2, 3], PARAMS).finish().token_ids != expected:
        sys.exit("the parent's tokens changed")
    print("all is well")


if __name__ == "__main__":
    main()
