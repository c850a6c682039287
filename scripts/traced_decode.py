"""Decode with NVTX ranges: the program that nsys_profile.py and ncu_profile.py profile.

After a warm-up, one range "decode" encloses the rest: a range per token for ordinary decode steps (on a GPU, replays of
a graph), then tokens whose ops run one by one, with a range per op.

    python scripts/traced_decode.py --geometry llama-3.2-3b --tokens 16 --op-tokens 1

Needs the extra `profile` (nvtx).
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nsight
import nvtx

from numba_atomflow import AtomFlowError, Engine, SamplingParams
from numba_atomflow.backends.base import Memory, Observer
from numba_atomflow.checkpoint.find import DEFAULT_MODEL
from numba_atomflow.errors import OptionError
from numba_atomflow.model.presets import find_preset
from numba_atomflow.model.step import SAMPLE, Op

WARM_UP = 3  # tokens


class OpRanges:
    """An observer that puts every op into an NVTX range of its name."""

    def before(self, op: Op, memory: Memory) -> None:
        del memory
        nvtx.push_range(op.name)

    def after(self, op: Op, memory: Memory) -> None:
        del op, memory
        nvtx.pop_range()


@contextmanager
def captured() -> Iterator[None]:
    """The range that the tools profile."""
    handle = nvtx.start_range(nsight.CAPTURED)
    try:
        yield
    finally:
        nvtx.end_range(handle)


def traced_decode(engine: Engine, depth: int, tokens: int, op_tokens: int) -> None:
    """Decode after `depth` tokens up to the end of the context, so that run-ahead launches no further steps."""
    backend, prompt = engine.backend, [i % engine.geometry.vocabulary for i in range(depth + 1)]

    def run_ops(observer: Observer) -> None:
        backend.seek(depth)
        backend.observe(prompt[-1:], SAMPLE, observer)
        backend.seek(engine.position)

    reply = engine.generate_tokens(prompt, SamplingParams(ignore_eos=True, speculate="off"))
    for _ in range(WARM_UP):
        next(reply)
    run_ops(_NoObserver())
    with captured():
        for i in range(tokens):
            with nvtx.annotate(f"token {i}"):
                next(reply)
        for i in range(op_tokens):
            with nvtx.annotate(f"ops of token {i}"):
                run_ops(OpRanges())


class _NoObserver:
    """An observer that does nothing, for the first walk, which may compile or bind something."""

    def before(self, op: Op, memory: Memory) -> None: ...

    def after(self, op: Op, memory: Memory) -> None: ...


def op_records(engine: Engine, length: int) -> list[dict[str, Any]]:
    """Every op of a decode step with its compulsory reads of weights and KV cache in bytes."""
    return [
        {"name": op.name, "bytes": op.weight_bytes + op.cache_bytes(length)} for op in engine.backend.step(1, SAMPLE)
    ]


def open_engine(options: argparse.Namespace) -> Engine:
    """An engine for the model of the options, with as many positions as needed."""
    if options.depth < 0 or options.tokens < 0 or options.op_tokens < 0:
        raise OptionError("--depth, --tokens and --op-tokens must be 0 or more.")
    positions = options.depth + WARM_UP + options.tokens
    if options.geometry:
        return Engine.random(find_preset(options.geometry), options.backend, positions, name=options.geometry)
    return Engine.load(options.model or DEFAULT_MODEL, options.backend, positions)


def main() -> int:
    """Parse options and decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nsight.model_options(parser)
    parser.add_argument("--tokens", type=int, default=16, help="ordinary decode steps (default: 16)")
    parser.add_argument("--op-tokens", type=int, default=1, help="tokens whose ops are run one by one (default: 1)")
    parser.add_argument("--ops-out", type=Path, metavar="FILE", help="write the ops and their bytes here, as JSON")
    options = parser.parse_args()
    try:
        with open_engine(options) as engine:
            traced_decode(engine, options.depth, options.tokens, options.op_tokens)
            if options.ops_out:
                options.ops_out.write_text(json.dumps(op_records(engine, options.depth + 1)))
    except AtomFlowError as error:
        return nsight.leave(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
