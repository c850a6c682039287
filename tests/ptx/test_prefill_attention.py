"""Prefill attention compiled to machine code: scores and outputs stay in registers."""

import re

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler
from sass import between, operations

skip_without_compiler()

from numba_atomflow.ops.cuda.attention.prefill import prefill_attention_kernel  # noqa: E402
from numba_atomflow.ops.cuda.attention.prefill_plan import choose_prefill_attention_plan  # noqa: E402
from numba_atomflow.ops.cuda.layout.activations import ActivationTiles  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, assemble_arch_specific, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402

A100 = Chip(108, 166912, (8, 0))
RTX_4090 = Chip(128, 101376, (8, 9))
H200 = Chip(132, 232448, (9, 0))
RTX_5090 = Chip(170, 101376, (12, 0))


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "head_dim"), [(A100, 128), (A100, 256), (RTX_4090, 256), (H200, 256)], ids=str)
def test_mma_with_a_window_and_a_soft_cap(chip: Chip, head_dim: int) -> None:
    tiles = ActivationTiles(8 * head_dim, 2048)
    plan = choose_prefill_attention_plan(8, 4, head_dim, tiles, chip, window=4096, soft_cap=50.0)
    assert plan.instructions == "mma"
    spec = prefill_attention_kernel("prefill_attention", plan, dependent=chip.dependent_launch).spec
    ptx = make_ptx(spec.make(), spec, chip.capability)
    _, log = assemble(ptx, chip.capability)
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert not float64_arithmetic(ptx)


@pytest.mark.parametrize(
    ("chip", "head_dim"),
    [
        (A100, 128),
        pytest.param(RTX_4090, 64, marks=pytest.mark.slow),
        pytest.param(RTX_5090, 80, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_mma(chip: Chip, head_dim: int) -> None:
    plan = choose_prefill_attention_plan(24, 8, head_dim, ActivationTiles(24 * head_dim, 2048), chip)
    spec = prefill_attention_kernel("prefill_attention", plan, dependent=chip.dependent_launch).spec
    ptx = make_ptx(spec.make(), spec, chip.capability)
    _, log = assemble(ptx, chip.capability)
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert not float64_arithmetic(ptx)
    assert number(r"Used (\d+) registers", log) * plan.threads * 2 <= 65536, "two CTAs do not fit on an SM"
    row_blocks = plan.query_tile // 64
    products = 2 * plan.key_block // 8 * head_dim // 16 * row_blocks
    assert ptx.count("mma.sync.aligned.m16n8k16") == products
    # Both products' B, and Q of every warp's rows once for each 16 keys at most.
    assert (
        ptx.count("ldmatrix.sync") <= products // row_blocks // 2 + head_dim // 16 * row_blocks * plan.key_block // 16
    )


@pytest.mark.parametrize(
    ("head_dim", "bits", "few"),
    [
        (128, 16, False),
        pytest.param(128, 8, False, marks=pytest.mark.slow),
        pytest.param(128, 16, True, marks=pytest.mark.slow),
    ],
)
def test_wgmma(head_dim: int, bits: int, few: bool) -> None:
    plan = choose_prefill_attention_plan(24, 8, head_dim, ActivationTiles(24 * head_dim, 2048, bits), H200, few=few)
    spec = prefill_attention_kernel("prefill_attention", plan, dependent=True).spec
    assert spec.arch_specific
    code, log = assemble_arch_specific(spec.make(), spec, H200.capability)
    assert "C75" not in log, "wgmmas are serialised, or setmaxnreg is ignored"
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert number(r"Used (\d+) registers", log) * plan.threads <= 65536
    found = operations(code)
    assert found.count("HGMMA") == 2 * (head_dim // 16 + plan.key_block // 16)
    assert max(len(part) for part in between(found, "HGMMA", "HGMMA")) < 32, "something is done between wgmmas"
    beside_outputs = max(part.count("MUFU") for part in between(found, "DEPBAR", "DEPBAR"))
    assert beside_outputs >= plan.key_block // 2, "softmax does not run beside O += P V"
