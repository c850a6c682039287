"""The GEMM with mma.sync and the kernels around it as machine code, one of each kind: no spills, no local memory."""

import re
from typing import Any

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from kernel_catalogue import LLAMA, SHARED_BYTES, SMS  # noqa: E402

from numba_atomflow.ops.cuda.gemm import kernels  # noqa: E402
from numba_atomflow.ops.cuda.gemm.plan import mma_ctas_per_sm, mma_plan  # noqa: E402
from numba_atomflow.ops.cuda.gemv.projections import projection_layouts  # noqa: E402
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec, Planned  # noqa: E402
from numba_atomflow.ops.cuda.token.embedding import embed_chunk_kernel  # noqa: E402
from numba_atomflow.ops.cuda.token.rms_norm import rms_norm_tiles_kernel  # noqa: E402
from numba_atomflow.ops.cuda.token.rope import rope_chunk_kernel  # noqa: E402
from numba_atomflow.ops.formats import FP16  # noqa: E402

TOKENS = 2048


def gemm(kind: str, capability: tuple[int, int], tile_tokens: int, factory: Any, **options: Any) -> tuple[Planned, int]:
    """A projection of Llama 3.2 3B, and how many of its CTAs an SM must hold."""
    chip = Chip(SMS, SHARED_BYTES[capability], capability)
    layout = projection_layouts(LLAMA, chip, head=FP16)[kind]
    x = ActivationTiles(layout.in_features, TOKENS, weight_bits=layout.format.bits)
    plan = mma_plan(layout, x, tile_tokens, chip)
    planned = kernels.gemm_kernel(f"gemm_{kind}", factory, plan, chip.dependent_launch, **options)
    return planned, mma_ctas_per_sm(layout, tile_tokens)


def machine_code(spec: KernelSpec, capability: tuple[int, int], ctas_per_sm: int) -> str:
    """PTX, checked with the machine code that it becomes."""
    ptx = make_ptx(spec.make(), spec, capability)
    _, log = assemble(ptx, capability)
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert number(r"Used (\d+) registers", log) * spec.threads * ctas_per_sm <= 65536
    assert not re.search(r"\.local\b", ptx)
    assert not float64_arithmetic(ptx)
    return ptx


SWIGLU_OPTIONS = {"intermediate": ActivationTiles(LLAMA.ffn, TOKENS)}
QKV_OPTIONS = {"heads": LLAMA.heads, "kv_heads": LLAMA.kv_heads}


@pytest.mark.parametrize(
    ("kind", "capability", "tile_tokens", "factory", "options"),
    [
        ("qkv", (8, 0), 128, kernels.make_gemm_qkv, QKV_OPTIONS),
        pytest.param("gate_up", (8, 9), 64, kernels.make_gemm_swiglu, SWIGLU_OPTIONS, marks=pytest.mark.slow),
        pytest.param("down", (9, 0), 32, kernels.make_gemm_add, {}, marks=pytest.mark.slow),  # two CTAs share an SM
        pytest.param("lm_head", (12, 0), 64, kernels.make_gemm_store, {}, marks=pytest.mark.slow),  # float16
    ],
)
def test_gemm(kind: str, capability: tuple[int, int], tile_tokens: int, factory: Any, options: dict[str, Any]) -> None:
    planned, ctas_per_sm = gemm(kind, capability, tile_tokens, factory, **options)
    assert planned.spec.shared_bytes <= SHARED_BYTES[capability] // ctas_per_sm
    ptx = machine_code(planned.spec, capability, ctas_per_sm)
    for instruction in ("mma.sync.aligned.m16n8k16", "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global"):
        assert instruction in ptx
    assert ("e4m3x2" in ptx) == (capability >= (8, 9) and kind != "lm_head")
    assert not re.search(r"\b(?:div|rem)\.[su]64", ptx), "a division of 64 bits, which is a call of a subroutine"
    if capability < (9, 0):
        assert not re.search(r"griddepcontrol|cp\.async\.bulk|mbarrier|wgmma", ptx)


def test_kernels_around_it() -> None:
    capability = (8, 0)
    chip = Chip(SMS, SHARED_BYTES[capability], capability)
    x = ActivationTiles(LLAMA.hidden, TOKENS)
    for planned in (
        rms_norm_tiles_kernel("rms_norm_tiles", x, LLAMA.norm_eps, dependent=False),
        rope_chunk_kernel(32, 32, 80, LLAMA.norm_eps, bias=True, norm=True, norm_of_all_heads=False, dependent=False),
        embed_chunk_kernel(projection_layouts(LLAMA, chip)["embedding"]),
    ):
        machine_code(planned.spec, capability, 65536 // (64 * planned.spec.threads))
