"""Every GPU kernel compiled down to machine code for four architectures: no GPU, driver or toolkit is needed.

What is asked of the code: no spills, no stack, no local memory; weights come in 16-byte loads past L1, and activations
are staged 16 bytes at a time; no float64 that slipped in through NumPy's or numba's promotion rules. Registers are
compared with those in registers.json (ATOMFLOW_RECORD_REGISTERS=1 writes it).
"""

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from machine_code import check_registers, float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from kernel_catalogue import Entry, catalogue  # noqa: E402

from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx, rename, share_scopes  # noqa: E402

ARCHITECTURES = ((8, 0), (8, 9), (9, 0), (12, 0))
WEIGHT_LOAD = "ld.global.nc.L1::no_allocate.v4.u32"
CATALOGUES = {cc: {entry.name: entry for entry in catalogue(cc)} for cc in ARCHITECTURES}
# Kernels of the same name one after the other: architectures with the same abilities share what is slow.
CASES = sorted(
    (
        (name, cc)
        for cc in ARCHITECTURES
        for name in CATALOGUES[cc]
        if "paged32" not in name or cc == (9, 0)  # the kernels of paged8 with another constant
    ),
    key=lambda case: case[0],
)
# What --fast compiles: what is quick on every architecture, and one projection, attention and sampler of each kind.
QUICK = {"advance", "advance_sampled", "argmax", "embed_x1", "read", "prepack"}
FAST = {
    ("attention_x1", (9, 0)),
    ("qkv_x1", (8, 0)),
    ("gate_up_x5", (8, 9)),
    ("down_x1", (12, 0)),
    ("sample", (9, 0)),
    ("logprobs", (9, 0)),
    ("add_norm_x1 of Gemma 2", (8, 0)),
}


@lru_cache(maxsize=2)
def lower(entry: Entry) -> tuple[Any, tuple[int, int]]:
    """LLVM code of a kernel, which serves all architectures with the same abilities; and its launch bounds.

    `make_ptx` would go through numba's front end, which takes most of the time, for every architecture.
    """
    from numba.cuda import compiler

    share_scopes()
    kernel = entry.spec.make()
    bounds = kernel.targetoptions["launch_bounds"]
    library, _ = compiler._compile_pyfunc_with_fixup(
        kernel.py_func, entry.spec.numba_signature(), device=False, abi="numba", cc=(8, 9), launch_bounds=bounds
    )
    return library, bounds


@pytest.mark.parametrize(
    ("name", "cc"),
    [
        pytest.param(*case, marks=[] if case[0] in QUICK or case in FAST else pytest.mark.slow, id=f"{case[0]}-sm_{cc}")
        for case in CASES
        for cc in ["".join(map(str, case[1]))]
    ],
)
def test_machine_code(name: str, cc: tuple[int, int]) -> None:
    entry = CATALOGUES[cc][name]
    library, (threads, blocks) = lower(entry)
    (ptx,) = library.get_asm_strs(cc=cc)
    _, log = assemble(rename(ptx, entry.spec.name), cc)
    registers = number(r"Used (\d+) registers", log)
    print(f"{entry.name}: {registers} registers")

    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert registers * threads * blocks <= 65536
    if not entry.doubles:
        assert not float64_arithmetic(ptx)
    if entry.weights:
        assert ptx.count(WEIGHT_LOAD) >= 4
        assert ptx.count("L1::no_allocate") == ptx.count(WEIGHT_LOAD)
        assert "mma.sync.aligned.m16n8k16" in ptx
    if entry.kind in ("o", "down"):
        assert re.search(r"st\.shared\.v4\.\w32", ptx), "x is staged in less than 16 bytes at a time"
    if entry.converts:
        assert ("e4m3x2" in ptx) == (cc >= (8, 9) and entry.kind != "prepack")
    if cc < (9, 0):
        assert not re.search(r"griddepcontrol|cp\.async\.bulk|mbarrier", ptx)

    check_registers(entry.name, cc, registers)


@pytest.mark.parametrize("cc", [(9, 0), (12, 0)], ids=str)
def test_programmatic_dependent_launch_is_in_the_code(cc: tuple[int, int]) -> None:
    entry = CATALOGUES[cc]["argmax"]
    assert entry.spec.dependent
    ptx = make_ptx(entry.spec.make(), entry.spec, cc)
    wait, first_read = ptx.index("griddepcontrol.wait"), ptx.index("ld.global")
    assert wait < first_read, "read what the previous kernel may still write"
    assemble(ptx, cc)


@pytest.mark.parametrize("name", ["down_x1", "qkv_x8"])
def test_finding_the_weights_of_a_k_tile_takes_no_division(name: str) -> None:
    cc = (9, 0)
    spec = CATALOGUES[cc][name].spec
    arguments = dict(spec.arguments)
    plan = arguments["plan"]
    assert plan.layout.groups > 4
    arguments["plan"] = replace(plan, layout=replace(plan.layout, k_tile=4))
    spec = replace(spec, arguments=tuple(sorted(arguments.items())))
    ptx = make_ptx(spec.make(), spec, cc)
    assert not re.search(r"\b(?:div|rem)\.[su]", ptx)
    _, log = assemble(ptx, cc)
    assert number(r"(\d+) bytes spill stores", log) == 0
