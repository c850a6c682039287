"""Edits by device functions over a pretended driver: which graphs run, what is freed, and what is refused."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pretended_gpu import PretendedDriver, pretend_compiler
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Decode
from numba_atomflow.backends.cuda import edits as edits_module
from numba_atomflow.backends.cuda.backend import CudaBackend
from numba_atomflow.backends.cuda.edits import DeviceEdit
from numba_atomflow.errors import CheckpointError, OptionError, non_finite_logits
from numba_atomflow.model.step import NO_LOGITS

pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")
pytest.importorskip("numba_cuda", reason="the CUDA backend needs it; there is none for macOS")

from numba import cuda


@cuda.jit(device=True)
def same(row: Any, column: Any, _position: Any) -> Any:
    return row[column]


@cuda.jit(device=True)
def of_four(_a: Any, _b: Any, _c: Any, _d: Any) -> Any:
    return 0


@pytest.fixture(params=["graph", "persistent"])
def engine(
    pretended: PretendedDriver, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Engine]:
    pretend_compiler(monkeypatch)
    monkeypatch.setattr(edits_module, "assemble", lambda _ptx, _capability: (b"", ""))
    monkeypatch.setattr(edits_module, "make_ptx", lambda _kernel, spec, _capability: spec.name)
    path: Decode = request.param
    with Engine.random(tiny_geometry(), "cuda", 64, decode=path, prefill="gemv") as engine:
        yield engine


def kernels_of(pretended: PretendedDriver, engine: Engine) -> int:
    """Launches that are captured for the next decode step; none if it replays a graph that was there."""
    backend = engine.backend
    before = len(pretended.launched)
    backend.seek(0)
    backend.decode()
    return len(pretended.launched) - before


def edit_of(engine: Engine) -> DeviceEdit:
    """The one edit of the block."""
    ((_, edit),) = engine._open_context()._edits[0].running.edits
    assert isinstance(edit, DeviceEdit)
    return edit


def test_decode_steps_are_captured_with_the_kernels_of_edits(pretended: PretendedDriver, engine: Engine) -> None:
    layers, alive = engine.geometry.layers, pretended.counts()
    assert kernels_of(pretended, engine) == 0
    with engine.edit({"layer.*.output": same, "layer.0.k": same, "logits": same}):
        # embedding, five ops a layer, LM head, arg-max, sampling, advance; and the edits
        assert kernels_of(pretended, engine) == 1 + 5 * layers + 4 + layers + 2
        assert kernels_of(pretended, engine) == 0
        assert pretended.counts()["executable graph"] == alive["executable graph"] + 1
    for kind in ("executable graph", "memory"):
        assert pretended.counts()[kind] == alive[kind]
    assert kernels_of(pretended, engine) == 0


def test_a_block_frees_its_kernels_and_memory(pretended: PretendedDriver, engine: Engine) -> None:
    with engine.edit({"layer.0.output": same}):
        kernels_of(pretended, engine)
    alive = pretended.counts()  # with kernels for single tokens, which the first block has loaded
    for _ in range(2):
        with engine.edit({"layer.0.output": same, "layer.1.k": same}), engine.edit({"embedding": same}):
            assert kernels_of(pretended, engine) > 0
            assert pretended.counts() != alive
        assert pretended.counts() == alive


def test_closing_the_engine_within_a_block_frees_all(pretended: PretendedDriver, engine: Engine) -> None:
    with engine.edit({"layer.0.output": same}):
        engine.close()
    assert not pretended.live
    pretended.assert_used_well()


def test_beside_a_function_of_the_host_steps_run_op_by_op(pretended: PretendedDriver, engine: Engine) -> None:
    seen: list[tuple[int, ...]] = []

    def note(rows: Any, position: int) -> None:
        seen.append((position, *rows.shape))

    with engine.edit({"layer.0.output": same, "layer.1.output": note}):
        graphs = pretended.counts()["executable graph"]
        engine.backend.seek(3)
        engine.backend.prefill([5, 6], NO_LOGITS)
        assert seen == [(3, 2, engine.geometry.hidden)]
        assert pretended.counts()["executable graph"] == graphs
    with engine.edit({"layer.0.output": same}):
        inner = len(pretended.launched)
        with engine.edit({"layer.1.output": note}):
            assert len(pretended.launched) == inner
        assert kernels_of(pretended, engine) > 0


def test_rows_of_a_prompt_are_edited_some_at_a_time(pretended: PretendedDriver, engine: Engine) -> None:
    rows = np.random.default_rng(0).standard_normal((70, engine.geometry.hidden)).astype(np.float32)
    with engine.edit({"layer.0.output": same}):
        first = len(pretended.launched)
        np.testing.assert_array_equal(edit_of(engine)(rows, 5), rows)  # pretended kernels do nothing
        assert [config.gridDimX for config in pretended.launched[first:]] == [64, 6]


def test_a_function_that_returns_nan_is_named_and_not_the_model(
    pretended: PretendedDriver, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Any) -> tuple[int, ...]:
        raise non_finite_logits()

    monkeypatch.setattr(CudaBackend, "sampled_tokens", fail)
    with engine.edit({"layer.0.output": same}):
        with pytest.raises(CheckpointError):
            engine.backend.sampled_tokens()
        edit = edit_of(engine)
        with engine.backend.memory() as memory:
            memory.write(edit.block.fault, np.ones(1, np.int32))
        with pytest.raises(OptionError, match=r"edit of layer\.0\.output returned NaN"):
            engine.backend.sampled_tokens()
        with pytest.raises(CheckpointError):
            engine.backend.sampled_tokens()


def test_a_function_of_other_parameters_is_refused(
    pretended: PretendedDriver, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba_atomflow.ops.cuda.runtime.build import make_ptx

    monkeypatch.setattr(edits_module, "make_ptx", make_ptx)
    alive = pretended.counts()
    with (
        pytest.raises(
            OptionError, match=r"device function of embedding cannot be compiled .*\(row, column, position\)"
        ),
        engine.edit({"embedding": of_four}),
    ):
        pass
    assert pretended.counts() == alive
    assert kernels_of(pretended, engine) == 0


def test_a_cpu_refuses_device_functions() -> None:
    with Engine.random(tiny_geometry(layers=1), "cpu", 64, threads=1) as engine:
        engine.feed([5, 6])
        with pytest.raises(OptionError, match=r"layer\.0\.output is a device function .* backend is cpu"):  # noqa: SIM117
            with engine.edit({"layer.0.output": same}):
                pass
        assert engine.position == 2
