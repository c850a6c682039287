"""The persistent decode kernel compiled down to machine code: no GPU, driver or toolkit is needed.

One layer of Qwen, whose K is no multiple of a k-tile, and one of Llama 3.2 1B, which has 8-row tiles: all layers run
through the same code. It takes half a minute to compile, and needs sm_90: so it is not in the catalogue of
`kernel_catalogue.py`, but its registers are recorded with theirs.
"""

import re

import pytest
from machine_code import check_registers, float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from kernel_catalogue import PERSISTENT_MODELS, SHARED_BYTES, SMS  # noqa: E402

from numba_atomflow.backends.cuda.kernels import ModelKernels  # noqa: E402
from numba_atomflow.geometry import ModelGeometry  # noqa: E402
from numba_atomflow.ops.cuda.persistent.schedule import DOWN  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec  # noqa: E402

VECTORS = 3  # that are received: the residual stream, attn_out, intermediate
SMOLLM2, LLAMA, QWEN = PERSISTENT_MODELS.values()


def _compiled(spec: KernelSpec, cc: tuple[int, int]) -> tuple[str, int]:
    """PTX of a kernel that needs no memory for registers, and the number of these."""
    ptx = make_ptx(spec.make(), spec, cc)
    _, log = assemble(ptx, cc)
    registers = number(r"Used (\d+) registers", log)
    print(f"{spec.name}: {registers} registers")
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert registers * spec.threads <= 65536
    assert not float64_arithmetic(ptx)
    return ptx, registers


@pytest.mark.slow
def test_machine_code_of_a_step_of_8_tokens() -> None:
    """The widest: it has the fewest registers to spare."""
    kernels = ModelKernels(LLAMA, Chip(SMS, SHARED_BYTES[9, 0], (9, 0)), persistent=True)
    assert kernels.wide_shapes[8].plans[DOWN].k_halves
    spec = kernels.planned["persistent_x8"].spec
    ptx, registers = _compiled(spec, (9, 0))
    assert spec.cooperative
    assert ptx.count("vote.sync.ballot.b32") == VECTORS
    assert not re.search(r"div\.[su]64", ptx)
    check_registers("persistent_x8 of Llama 1B's layer", (9, 0), registers)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "model", "geometry", "cc"),
    [
        ("persistent", "Qwen", QWEN, (9, 0)),
        ("persistent", "Llama 1B", LLAMA, (9, 0)),
        ("persistent", "Llama 1B", LLAMA, (12, 0)),  # both take 20 s each, and differ in sizes alone
        ("publish", "SmolLM2", SMOLLM2, (9, 0)),
        ("publish", "SmolLM2", SMOLLM2, (12, 0)),
        ("publish", "Qwen", QWEN, (9, 0)),
    ],
    ids=str,
)
def test_machine_code(name: str, model: str, geometry: ModelGeometry, cc: tuple[int, int]) -> None:
    """No spills, stack or local memory; no float64; weights come by bulk copies, and in no other way."""
    kernels = ModelKernels(geometry, Chip(SMS, SHARED_BYTES[cc], cc), persistent=True)
    assert kernels.persistent_shape.refusal() is None
    assert kernels.persistent_shape.plans[DOWN].half_tiles == (model == "Llama 1B")
    spec = kernels.planned[name].spec
    ptx, registers = _compiled(spec, cc)
    if name == "persistent":
        assert spec.cooperative
        assert "L1::no_allocate" not in ptx
        for instruction in (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
            "mbarrier.init.shared::cta.b64",
            "mbarrier.arrive.expect_tx.shared::cta.b64",
            "mbarrier.try_wait.parity.shared::cta.b64",
            "mbarrier.test_wait.parity.shared::cta.b64",
            "cp.async.bulk.prefetch.L2.global",
            "fence.mbarrier_init.release.cluster",
            "mma.sync.aligned.m16n8k16",
            "e4m3x2",
        ):
            assert instruction in ptx
        # All lanes of a warp must take part in a vote: once for each kind of vector, not duplicated in a branch.
        assert ptx.count("vote.sync.ballot.b32") == VECTORS
        # Words of the mailbox: two of 8 bytes at once, past L1, and never as ordinary accesses.
        assert "ld.relaxed.gpu.global.v2.b64" in ptx
        assert "st.relaxed.gpu.global.b64" in ptx
    check_registers(f"{name} of {model}'s layer", cc, registers)
