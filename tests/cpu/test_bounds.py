"""Memory access of kernels: complete runs in guarded memory, and the argument checks before each call."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import memory_walk
import numpy as np
import pytest
from cli_runner import ROOT
from guarded_arena import CanaryArena
from memory_walk import BLOCK, CONTEXTS, GEOMETRIES, walk_engine, walk_sandbox, write_out_of_bounds
from tiny_models import tiny_geometry

from numba_atomflow import Engine
from numba_atomflow.backends.base import Memory
from numba_atomflow.backends.cpu import backend as cpu_backend
from numba_atomflow.checkpoint.arrays import WeightArrays
from numba_atomflow.checkpoint.random_weights import RandomModel
from numba_atomflow.memory.plan import MemoryPlan
from numba_atomflow.model.step import NO_LOGITS, Attention, Op
from numba_atomflow.ops import attention, elementwise, embedding, paged_attention, projection, rms_norm, rope
from numba_atomflow.ops.arguments import bind
from numba_atomflow.quantize import forward
from numba_atomflow.sandbox import cpu_runner
from numba_atomflow.sandbox.runner import CacheSizes
from numba_atomflow.sandbox.scheduler import Batch

# --- guarded memory ----------------------------------------------------------------------------------------------


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """New arenas have canaries; the function checks them."""
    arenas: list[CanaryArena] = []

    def arena(plan: MemoryPlan) -> CanaryArena:
        arenas.append(CanaryArena(plan))
        return arenas[-1]

    for module in (cpu_backend, cpu_runner, forward):
        monkeypatch.setattr(module, "HostArena", arena)
    monkeypatch.setattr(cpu_backend, "PREFILL_CHUNK", BLOCK)

    def check() -> None:
        assert arenas
        for each in arenas:
            each.check()

    return check


@pytest.mark.parametrize("name", GEOMETRIES)
def test_an_engine_writes_only_to_its_buffers(name: str, canaries: Callable[[], None]) -> None:
    for context in CONTEXTS:
        walk_engine(GEOMETRIES[name], context, canaries)


@pytest.mark.parametrize("name", ["llama", "odd"])
def test_the_sandbox_writes_only_to_its_buffers(name: str, canaries: Callable[[], None]) -> None:
    walk_sandbox(GEOMETRIES[name], canaries)


@pytest.mark.parametrize("tokens", [1, 2, 5, 131])
@pytest.mark.parametrize("name", ["odd", "qwen2", "qwen3"])
def test_calibration_writes_only_to_its_buffers(name: str, tokens: int, canaries: Callable[[], None]) -> None:
    memory_walk.walk_calibration(GEOMETRIES[name], tokens, canaries)


def test_canaries_detect_a_row_out_of_bounds(canaries: Callable[[], None]) -> None:
    write_out_of_bounds()
    with pytest.raises(AssertionError, match="after kv_cache"):
        canaries()


def in_guarded_pages(*arguments: str) -> subprocess.CompletedProcess[str]:
    walk = [sys.executable, ROOT / "tests" / "support" / "memory_walk.py", *arguments]
    return subprocess.run(walk, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("side", ["above", "below"])
def test_no_access_to_guard_pages(side: str) -> None:
    done = in_guarded_pages(side)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.endswith("sandbox\ncalibration\n")


def test_guard_pages_detect_a_row_out_of_bounds() -> None:
    assert in_guarded_pages("above", "fault").returncode == -signal.SIGSEGV


# --- checks before a step ----------------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Any:
    with Engine.random(tiny_geometry(layers=1), "cpu", max_seq_len=8) as engine:
        yield engine.backend


def test_the_warm_up_keeps_the_position(backend: Any) -> None:
    assert backend._position[0] == 0


@pytest.mark.parametrize("position", [-1, 9])
def test_positions_outside_the_cache(backend: Any, position: int) -> None:
    with pytest.raises(IndexError, match="position"):
        backend.seek(position)


def test_steps_that_end_outside_the_cache(backend: Any) -> None:
    backend.seek(7)
    with pytest.raises(IndexError, match="positions 7 to 8 of 8"):
        backend.prefill([1, 2], NO_LOGITS)
    with pytest.raises(IndexError, match="positions 7 to 8 of 8"):
        backend.observe([1, 2], NO_LOGITS, memory_walk.ReadingObserver())
    backend.decode()
    for one_more in (backend.decode, lambda: backend.measure.time_step(1), lambda: backend.measure.time_ops(1)):
        with pytest.raises(IndexError, match="positions 8 to 8 of 8"):
            one_more()


@pytest.mark.parametrize("token", [-1, 288, 2**31 - 1])
def test_tokens_outside_the_vocabulary(backend: Any, token: int) -> None:
    with pytest.raises(IndexError, match="tokens"):
        backend.prefill([3, token], NO_LOGITS)
    backend._tokens[0] = token  # as if it had been sampled
    with pytest.raises(IndexError, match="tokens"):
        backend.decode()


class Mover:
    """An observer that changes the position, which is not allowed."""

    def before(self, op: Op, memory: Memory) -> None:
        if isinstance(op, Attention):
            memory.write(op.position, np.array([8]))

    def after(self, op: Op, memory: Memory) -> None: ...


def test_an_observer_that_moves_the_position(backend: Any) -> None:
    with pytest.raises(IndexError, match="positions 8 to 8 of 8"):
        backend.observe([1], NO_LOGITS, Mover())


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"tokens": np.array([0, 288], np.int32)}, "tokens"),
        ({"positions": np.array([0, 24])}, "positions"),
        ({"positions": np.array([0, -1])}, "positions"),
        ({"slots": np.array([0, 32])}, "slots"),
        ({"table_rows": np.array([0, 2])}, "rows"),
        ({"table_rows": np.array([0])}, "not those of 2 tokens"),
        ({"positions": np.array([0, 8])}, "blocks"),  # an entry of its row that is out of bounds
        ({"copies": [cpu_runner.BlockCopy(0, 4)]}, "blocks"),
    ],
)
def test_a_batch_with_indices_out_of_bounds(changes: dict[str, Any], argument: str) -> None:
    geometry = tiny_geometry(layers=1)
    sizes = CacheSizes(slots=32, block_sizes=(8,), sequences=2, longest=24)
    runner = cpu_runner.CpuRunner(geometry, dict(WeightArrays(RandomModel(geometry))), sizes)
    runner.block_table[:, 1:] = 4  # there are blocks 0 to 3
    zeros = np.zeros(2, np.int64)
    batch = Batch([], np.zeros(2, np.int32), zeros, zeros, np.array([0, 1]), np.array([0, 8]), [], [])
    runner.run(batch)
    with pytest.raises(IndexError, match=argument):
        runner.run(replace(batch, **changes))


# --- shapes ------------------------------------------------------------------------------------------------------


def empty(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


T, N, K, DIM, HEADS, KV_HEADS, LENGTH = 6, 10, 200, 64, 4, 2, 7
Q, KV = HEADS * DIM, KV_HEADS * DIM
WEIGHT = empty(N, K, dtype="int8"), empty(N, 2)
CACHE = empty(LENGTH, KV), empty(LENGTH, KV)
TABLES = empty(LENGTH, DIM // 2), empty(LENGTH, DIM // 2)
POSITION, PLACES = empty(1, dtype="int64"), empty(T, dtype="int64")
WHOLE = attention.NO_WINDOW, attention.NO_CAP
CHUNK_SCRATCH = empty(1, attention.chunk_scratch(DIM))
PROJECT_SCRATCH = empty(1, projection.chunk_scratch())

SOUND: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "embed": (embedding.embed, (empty(T, dtype="int32"), *WEIGHT, empty(T, K))),
    "project_token": (projection.project_token, (*WEIGHT, empty(1, K), empty(1, N), False)),
    "project_tokens": (projection.project_tokens, (*WEIGHT, empty(T, K), empty(T, N), False)),
    "project_token_swiglu": (projection.project_token_swiglu, (*WEIGHT, empty(1, K), empty(1, N // 2))),
    "project_tokens_swiglu": (projection.project_tokens_swiglu, (*WEIGHT, empty(T, K), empty(T, N // 2))),
    "project_chunk": (projection.project_chunk, (*WEIGHT, empty(T, K), empty(T, N), False, PROJECT_SCRATCH)),
    "project_chunk_swiglu": (
        projection.project_chunk_swiglu,
        (*WEIGHT, empty(T, K), empty(T, N // 2), PROJECT_SCRATCH),
    ),
    "geglu": (elementwise.geglu, (empty(T, 2 * N), empty(T, N))),
    "soft_cap": (elementwise.soft_cap, (empty(T, N), 30.0)),
    "swiglu": (projection.swiglu, (empty(T, 2 * N), empty(T, N))),
    "rms_norm": (rms_norm.rms_norm, (empty(T, K), empty(K), 1e-5, empty(T, K))),
    "add_rms_norm": (rms_norm.add_rms_norm, (empty(T, K), empty(K), 1e-5, empty(T, K))),
    "rms_norm_heads": (rms_norm.rms_norm_heads, (empty(T, Q + 2 * KV), empty(DIM), empty(DIM), Q, KV, 1e-5)),
    "rope_and_store": (rope.rope_and_store, (empty(T, Q + 2 * KV), POSITION, *TABLES, empty(T, Q), *CACHE)),
    "rope_and_store_paged": (
        rope.rope_and_store_paged,
        (empty(T, Q + 2 * KV), PLACES, PLACES, *TABLES, empty(T, Q), *CACHE),
    ),
    "attend_tokens": (
        attention.attend_tokens,
        (empty(T, Q), *CACHE, POSITION, DIM, *WHOLE, empty(1, T, LENGTH), empty(T, Q)),
    ),
    "attend_chunk": (attention.attend_chunk, (empty(T, Q), *CACHE, POSITION, DIM, *WHOLE, CHUNK_SCRATCH, empty(T, Q))),
    "attend_paged": (
        paged_attention.attend_paged,
        (empty(T, Q), *CACHE, empty(2, 3, dtype="int32"), PLACES, PLACES, 8, DIM, empty(2, LENGTH), empty(T, Q)),
    ),
}
# What may be smaller: (argument, axis).
FREE = {
    "rms_norm_heads": {(0, 0)},
    "project_chunk": {(5, 0)},  # threads
    "project_chunk_swiglu": {(4, 0)},
    "soft_cap": {(0, 0), (0, 1)},
    "attend_tokens": {(7, 0)},
    "attend_chunk": {(7, 0)},
    "attend_paged": {(3, 0), (3, 1), (8, 0), (8, 1)},
}


@pytest.mark.parametrize("name", SOUND)
def test_shapes_that_disagree(name: str) -> None:
    kernel, arguments = SOUND[name]
    bind(kernel, *arguments)
    for i, argument in enumerate(arguments):
        if not isinstance(argument, np.ndarray):
            continue
        for axis in range(argument.ndim):
            if (i, axis) in FREE.get(name, ()):
                continue
            smaller = argument.take(range(argument.shape[axis] - 1), axis)
            with pytest.raises(IndexError, match=f"^{name} cannot take"):
                bind(kernel, *arguments[:i], smaller, *arguments[i + 1 :])


def test_every_kernel_with_views_checks_its_arguments() -> None:
    modules = (attention, elementwise, embedding, paged_attention, projection, rms_norm, rope)
    kernels = {name for module in modules for name, value in vars(module).items() if hasattr(value, "_cache_hits")}
    inlined = {
        "silu",
        "gelu",
        "_cap",
        "_fill_unseen",
        "_norm_in_place",
        "convert_biased",
        "_rotate",
        "_store_token",
        "_columns",
        "_attend_items",
        "_make_panel",
        "_multiply_panels",
        "_token_pieces",
    }
    assert kernels - inlined == set(SOUND)
