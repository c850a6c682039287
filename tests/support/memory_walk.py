"""Runs all code paths of a small engine and a small sandbox, for tests of the memory that kernels access.

As a program: SIDE [FAULT]. Uses arenas with guard pages on that side; with FAULT, one kernel call writes one row out of
bounds.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from guarded_arena import GuardedArena, guarded_copy
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.base import Memory
from numba_atomflow.backends.cpu import backend as cpu_backend
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.format import tensor_layout
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.errors import ContextError
from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.model.step import NO_LOGITS, SAMPLE, Op
from numba_atomflow.ops.projection import GEMV_TOKENS
from numba_atomflow.quantize import forward
from numba_atomflow.quantize.inputs import Inputs
from numba_atomflow.quantize.threads import cores_for_blas
from numba_atomflow.sandbox import cpu_runner
from numba_atomflow.sandbox.engine import Fork, ServingEngine
from numba_atomflow.sandbox.requests import Request
from numba_atomflow.sandbox.runner import cache_sizes

BLOCK = 9  # the prefill chunk here: larger than a prompt that is taken token by token, smaller than a context

GEOMETRIES = {
    "llama": tiny_geometry(layers=1, tied_embeddings=True),
    "odd": tiny_geometry(hidden=136, heads=3, kv_heads=1, head_dim=80, ffn=129, vocabulary=259),
    "qwen2": tiny_geometry(layers=1, heads=2, kv_heads=2, qkv_bias=True),
    "qwen3": tiny_geometry(layers=1, heads=6, kv_heads=3, qk_norm=True),
}
CONTEXTS = (1, 2, 3, 4, 5, 6, BLOCK, BLOCK + 1, 2 * BLOCK + 5)


class ReadingObserver:
    """Reads every view that an op reads or writes."""

    def before(self, op: Op, memory: Memory) -> None:
        for view in op.reads:
            memory.read(view)

    def after(self, op: Op, memory: Memory) -> None:
        for view in op.writes:
            memory.read(view)


def walk_engine(geometry: ModelGeometry, context: int, check: Callable[[], None] = lambda: None) -> None:
    """Prompts of the lengths at which kernels change, generation to the end, rewinds, observed and timed steps.

    `check` is called after each.
    """
    with Engine.random(geometry, "cpu", max_seq_len=context) as engine:
        check()
        backend, tokens = engine.backend, (np.arange(context) * 7 % geometry.vocabulary).tolist()
        tokens[0], tokens[-1] = 0, geometry.vocabulary - 1
        lengths = (1, 2, GEMV_TOKENS, GEMV_TOKENS + 1, BLOCK, BLOCK + 1, context - 1, context)
        for length in sorted({length for length in lengths if 1 <= length <= context}):
            reply = engine.generate_tokens(tokens[:length], SamplingParams(temperature=1.0, seed=length)).finish()
            assert reply.finish_reason == "context"
            assert engine.position == context
            check()
            engine.rewind(context // 2)
            assert np.isfinite(engine.feed(tokens[context // 2 :], all_logits=True)).all()
            check()
            engine.reset()
            assert np.isfinite(engine.feed(tokens[:length])).all()
            check()
        try:
            engine.feed([0])
        except ContextError:
            pass
        else:
            raise AssertionError("a token after the last position was accepted")
        for start in range(0, context, backend.observed_chunk):
            backend.seek(start)
            backend.observe(tokens[start : start + backend.observed_chunk], SAMPLE, ReadingObserver())
            check()
        backend.logits(0, min(backend.observed_chunk, context), ReadingObserver())
        backend.seek(context - 1)
        backend.measure.time_ops(2)
        backend.measure.time_step(2)
        check()


def walk_sandbox(geometry: ModelGeometry, check: Callable[[], None] = lambda: None) -> None:
    """Requests that share prefixes, fork and are preempted, in a cache that is too small for all of them."""
    sizes = cache_sizes(geometry, blocks=9, block_sizes=(8,), sequences=3, longest=40)
    runner = cpu_runner.CpuRunner(geometry, dict(WeightArrays(RandomModel(geometry))), sizes)
    runner.prepare()
    check()
    server = ServingEngine(runner, block_order=range(8, -1, -1))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, geometry.vocabulary, n).tolist() for n in (1, 8, 17, 30)]
    prompts.append([*prompts[-1][:-1], geometry.vocabulary - 1])
    requests = [Request(i, prompt, 40 - len(prompt)) for i, prompt in enumerate(prompts)]
    finished = server.serve(requests, [Fork(parent=0, id=9, after=3, tokens=[5], max_tokens=6)])
    assert len(finished) == len(prompts) + 1
    assert sum(request.preemptions for request in finished), "nothing was preempted"
    check()


def walk_calibration(geometry: ModelGeometry, tokens: int, check: Callable[[], None] = lambda: None) -> None:
    """The calibration's forward pass of one layer on two sequences."""
    g = geometry
    names = {"qkv": g.hidden, "o": g.q_dim, "gate_up": g.hidden, "down": g.ffn}
    inputs = {name: Inputs(width) for name, width in names.items()}
    rng = np.random.default_rng(0)
    layer = {
        name.removeprefix("layer.0."): rng.standard_normal(shape, np.float32)
        for name, (dtype, shape) in tensor_layout(g).items()
        if name.startswith("layer.0.") and not name.endswith(".scale")
    }
    layer = {name.removesuffix(".weight"): values for name, values in layer.items()}
    layer_forward = forward.LayerForward(g, tokens)
    with cores_for_blas():
        for stream in rng.standard_normal((2, tokens, g.hidden), np.float32):
            layer_forward.run(layer, stream, inputs)
            assert np.isfinite(stream).all()
            check()


def write_out_of_bounds() -> None:
    """Write a token after the last position, as a warm-up would that does not reset the position."""
    with Engine.random(GEOMETRIES["llama"], "cpu", max_seq_len=2) as engine:
        backend: Any = engine.backend
        backend._position[0] = 2
        for action in backend.bound_step(1, NO_LOGITS):
            action()


def guarded(side: str) -> Iterator[str]:
    """Run all walks between guard pages; yields the name of each finished walk."""

    def arena(plan: Any) -> GuardedArena:
        return GuardedArena(plan, side)  # type: ignore[arg-type]

    cpu_backend.HostArena = cpu_runner.HostArena = forward.HostArena = arena  # type: ignore[misc, assignment]
    array = RandomModel.array
    RandomModel.array = lambda model, name: guarded_copy(array(model, name), side)  # type: ignore[method-assign, arg-type]
    cpu_backend.PREFILL_CHUNK = BLOCK
    for name, geometry in GEOMETRIES.items():
        for context in CONTEXTS if name == "llama" else (1, GEMV_TOKENS + 1, 2 * BLOCK + 5):
            walk_engine(geometry, context)
            yield f"{name} {context}"
    walk_sandbox(GEOMETRIES["odd"])
    yield "sandbox"
    walk_calibration(GEOMETRIES["odd"], 131)
    yield "calibration"


def main(side: str, fault: str = "") -> None:
    walks = guarded(side)
    if fault:
        next(walks)
        write_out_of_bounds()
    for name in walks:
        print(name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
