"""A trace of the persistent kernel on a GPU: what it says of the step, and that it leaves the engine as it was."""

from collections.abc import Iterator

import numpy as np
import pytest
from device_launch import capability
from tiny_models import tiny_geometry

from numba_atomflow import Engine, SamplingParams
from numba_atomflow.backends.trace import StepTrace
from numba_atomflow.model.step import SAMPLE
from numba_atomflow.perf.profile import profile

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if capability() < (9, 0):
        pytest.skip("this GPU has no TMA bulk copies (sm_90 and later have)")
    with Engine.random(tiny_geometry(), "cuda", 96, decode="persistent") as engine:
        yield engine


def trace_of(engine: Engine) -> StepTrace:
    trace = engine.backend.measure.trace_step(3)
    assert trace is not None
    return trace


def test_every_op_is_in_the_trace_in_its_order(engine: Engine) -> None:
    engine.reset()
    engine.feed(PROMPT)
    trace = trace_of(engine)
    assert trace.names == tuple(op.name for op in engine.backend.step(1, SAMPLE)[:-2])
    assert not np.isnan(trace.done[:, 1:]).all(axis=0).any()
    assert trace.ends[0] < trace.ends[6] < trace.ends[-1]  # a layer and the vocabulary take their time
    shares = ~np.isnan(trace.staged)
    assert (trace.begun <= trace.staged)[shares].all()
    assert (trace.staged <= trace.done)[shares].all()
    projections = [op for op, name in enumerate(trace.names) if op and not name.endswith("attention")]
    copied = ~np.isnan(trace.copy_begun)
    assert copied[:, projections].any(axis=0).all()
    assert (trace.copy_begun <= trace.done)[copied].all()
    assert 1e3 < trace.ends[-1] < 1e7  # ns


def test_a_trace_leaves_no_trace(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20)
    engine.reset()
    before = list(engine.generate_tokens(PROMPT, params))
    trace_of(engine)
    engine.reset()
    assert list(engine.generate_tokens(PROMPT, params)) == before
    engine.reset()
    engine.feed(PROMPT)
    trace_of(engine)
    assert engine.position == len(PROMPT)


def test_a_profile_is_made_of_it(engine: Engine) -> None:
    report = profile(engine, 20, repeats=5)
    assert report.ops_measured == "as traced"
    counts = {kernel.kind: kernel.count for kernel in report.kernels}
    layers = dict.fromkeys(("qkv", "attention", "o", "gate_up", "down"), 2)
    assert counts == layers | {"embed": 1, "lm_head": 1}, "the kernel makes the whole step"
    assert abs(report.gap_seconds) < report.step_seconds
