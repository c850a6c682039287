"""Instructions of sm_90a compiled down to machine code: no GPU, driver or toolkit is needed."""

import re
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from machine_code import number, skip_without_compiler

skip_without_compiler()

from numba import cuda, float32, uint32  # noqa: E402

from numba_atomflow.ops import ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble_arch_specific, entry_name, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import F32, U32, kernel_spec  # noqa: E402

N, REGISTERS, THREADS = 64, 32, 256


class Arguments(NamedTuple):
    a: U32
    out: F32


def make_every_form() -> Any:
    """A consumer and a producer warpgroup; every form of the instruction, in a batch of its own."""
    plain = ptx.make_wgmma(N, a_first=4)
    a_shared, fp8_shared = (ptx.make_wgmma(N, a_first=None, element=element) for element in ("f16", "e4m3"))
    fp8, transposed = ptx.make_wgmma(N, element="e4m3"), ptx.make_wgmma(N, transposed=True)
    product = ptx.make_wgmma(N, accumulate=False)
    fence = ptx.make_wgmma_fence(ptx.Registers(REGISTERS), ptx.Registers(8))
    wait = ptx.make_wgmma_wait(0, ptx.Registers(REGISTERS))
    more, fewer = ptx.make_set_registers("inc", 232), ptx.make_set_registers("dec", 40)

    @ptx.kernel(THREADS, 1)
    def every_form(io):
        words = cuda.shared.array(0, uint32)
        sums, a = cuda.local.array(REGISTERS, float32), cuda.local.array(8, uint32)
        thread = cuda.threadIdx.x
        if thread >= 128:
            fewer()
            if thread == 128:
                ptx.bulk_store(io.a, 1024, words, ptx.shared_address(words, 0), np.uint32(128))
                ptx.bulk_store_commit()
                ptx.bulk_store_wait_read()
                ptx.bulk_store_wait()
        else:
            more()
            for i in range(8):
                a[i] = io.a[i * 128 + thread]
            b = ptx.wgmma_descriptor(ptx.shared_address(words, 0), 16, 1024)
            fence(sums, a)
            product(sums, a, words, b)
            plain(sums, a, words, b + np.uint64(2))
            a_shared(sums, words, b, b)
            transposed(sums, a, words, b)
            fp8(sums, a, words, b)
            fp8_shared(sums, words, b, b)
            ptx.wgmma_commit()
            wait(sums)
            for i in range(REGISTERS):
                io.out[i * 128 + thread] = sums[i]

    return every_form


def test_wgmma_is_not_serialised_and_registers_are_moved_between_warpgroups() -> None:
    spec = replace(kernel_spec("every_form", make_every_form, Arguments, THREADS), arch_specific=True)
    kernel = spec.make()
    text = make_ptx(kernel, spec, (9, 0))
    issued = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n64(\S+)", text)
    assert sorted(issued) == 4 * ["k16.f32.f16.f16"] + 2 * ["k32.f32.e4m3.e4m3"]
    assert len(re.findall(r"p, 1, 1, 1; }", text)) == 1  # B transposed
    assert "setmaxnreg.inc.sync.aligned.u32 232;" in text
    assert not re.search(r"\.local\b", text)

    code, log = assemble_arch_specific(kernel, spec, (9, 0))
    assert "C75" not in log, log  # setmaxnreg ignored, wgmma serialised
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert number(r"(\d+) bytes stack frame", log) == 0
    assert "every_form" in entry_name(code)
    assert f"entry function '{entry_name(code)}'" in log
