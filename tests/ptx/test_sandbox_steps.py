"""The launches of the sandbox's steps, without a GPU: arguments have the kernel's types, and lie in the memory plan."""

import os
from collections.abc import Iterable
from math import prod
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_geometry

from numba_atomflow.geometry import ModelGeometry
from numba_atomflow.memory.view import View
from numba_atomflow.model.presets import PRESETS

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator replaces the compiler in this process", allow_module_level=True)

from numba_atomflow.ops.cuda.runtime.chip import Chip
from numba_atomflow.ops.cuda.runtime.spec import Planned
from numba_atomflow.sandbox.gpu_kernels import SandboxKernels
from numba_atomflow.sandbox.gpu_runner import GpuRunner
from numba_atomflow.sandbox.runner import CacheSizes

H100 = Chip(132, 232448, (9, 0))
RTX_4090 = Chip(128, 101376, (8, 9))
Launches = list[tuple[Planned, Any]]
SIZES = CacheSizes(slots=4096, block_sizes=(16, 8), sequences=8, longest=1024)


def runner(geometry: ModelGeometry, chip: Chip, seen: Launches, required: list[str]) -> GpuRunner:
    """A runner without a GPU, whose launches are collected, and the names of the kernels that it loads at once."""
    made = GpuRunner.__new__(GpuRunner)
    made.geometry, made.sizes, made.block_size = geometry, SIZES, 16
    made.kernels = SandboxKernels(geometry, chip, SIZES)
    made._head = "embedding" if geometry.tied_embeddings else "vocabulary"
    kinds = ("qkv", "o", "gate_up", "down")
    parts = ["embedding", *(f"layer.{i}.{kind}" for i in range(geometry.layers) for kind in kinds)]
    parts += [] if geometry.tied_embeddings else ["vocabulary"]
    norms = [f"layer.{i}.{kind}_norm" for i in range(geometry.layers) for kind in ("attention", "ffn")]
    plan = made.kernels.plan(dict.fromkeys([*norms, "final_norm"], geometry.hidden), parts)
    made._arena = {  # type: ignore[assignment]
        buffer.name: View(buffer.name, offset, buffer.shape, buffer.dtype)
        for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
    }

    def launch(planned: Planned, arguments: tuple[Any, ...]) -> Any:
        seen.append((planned, arguments))

    def require(planned: Iterable[Planned]) -> None:
        required.extend(kernel.spec.name for kernel in planned)

    made._launch_planned = launch  # type: ignore[method-assign]
    made._require = require  # type: ignore[method-assign]
    return made


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["paged", "static"])
@pytest.mark.parametrize("chip", [H100, RTX_4090], ids=["H100", "RTX 4090"])
@pytest.mark.parametrize("geometry", [tiny_geometry(), PRESETS["llama-3.2-3b"], PRESETS["llama-3.1-8b"]], ids=str)
def test_every_launch_fits_its_kernel_and_stays_in_its_memory(geometry: ModelGeometry, chip: Chip, layout: Any) -> None:
    seen: Launches = []
    made = runner(geometry, chip, seen, [])
    for width in made.kernels.widths:
        seen.clear()
        made._step_launches(width, layout, True)
        assert len(seen) == 1 + 5 * geometry.layers + 1 + width
        check_arguments(seen, chip)
        q, keys, _, *_, partials, counters, attended = next(a for p, a in seen if p.spec.name.startswith("attention"))
        shape = made.kernels.attention_shape(width)
        assert prod(q.shape) >= width * geometry.q_dim
        assert keys.shape == (SIZES.slots + 16, geometry.kv_dim)
        assert partials.shape[0] >= width * shape.partials
        assert counters.shape[0] >= width * shape.work_tiles
        assert attended.shape[1] == shape.out_width


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chip", [H100, RTX_4090], ids=["H100", "RTX 4090"])
@pytest.mark.parametrize("geometry", [tiny_geometry(), PRESETS["llama-3.2-3b"]], ids=str)
def test_the_launches_of_a_chunk_too(geometry: ModelGeometry, chip: Chip) -> None:
    seen: Launches = []
    made = runner(geometry, chip, seen, required := [])
    assert made.kernels.prefill_chunk == SIZES.longest
    for bucket in (16, 128, 1024):
        seen.clear()
        required.clear()
        made._chunk_launches(bucket)
        assert {planned.spec.name for planned, _ in seen} == set(required)
        made._head_launches(1, bucket - 1)
        assert len(seen) == 1 + 9 * geometry.layers + 2
        check_arguments(seen, chip)
        (residual,) = (arguments.residual for planned, arguments in seen[:1])
        assert residual.shape[0] >= bucket


def test_results_that_depend_on_no_other_request_have_no_chunks() -> None:
    assert SandboxKernels(PRESETS["llama-3.2-3b"], H100, SIZES, same_width=True).prefill_chunk == 0


def check_arguments(seen: Launches, chip: Chip) -> None:
    """Of the kernels' types, whole elements; grids and shared memory that the chip has."""
    for planned, arguments in seen:
        spec = planned.spec
        assert len(arguments) == len(spec.element_types), spec.name
        assert planned.ctas > 0, spec.name
        assert spec.shared_bytes <= chip.shared_bytes
        for kind, view in zip(spec.element_types, arguments, strict=True):
            if isinstance(view, int):
                assert not kind.endswith("*"), spec.name
                continue
            size = np.dtype(kind.removesuffix("*")).itemsize
            assert view.extent % size == 0, (spec.name, view.name)
            same = view.dtype == kind.removesuffix("*") or {view.dtype, kind} in SAME_BYTES
            assert same, (spec.name, view.name, kind)


SAME_BYTES: tuple[set[str], ...] = (
    {"float16", "uint16*"},
    {"float16", "uint32*"},
    {"float32", "uint32*"},
    {"int64", "int32*"},  # tokens: the last of a step's inputs
)


def test_widths_are_those_that_fit_into_shared_memory() -> None:
    llama = PRESETS["llama-3.1-8b"]
    assert SandboxKernels(PRESETS["llama-3.2-3b"], H100, SIZES).widths == (1, 2, 4, 8)
    assert SandboxKernels(llama, H100, SIZES).widths == (1, 2, 4)
    assert SandboxKernels(llama, RTX_4090, SIZES).width_for(2) == 2
