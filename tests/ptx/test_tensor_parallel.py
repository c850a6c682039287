"""The persistent kernel of a rank compiled down to machine code: no GPU, driver or toolkit is needed."""

import re
from dataclasses import replace

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from kernel_catalogue import PERSISTENT_MODELS, SHARED_BYTES, SMS  # noqa: E402

from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels  # noqa: E402
from numba_atomflow.model.sharding import Sharding  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402


@pytest.mark.slow
def test_machine_code() -> None:
    """No spills, stack or local memory. Words that cross have system scope, those of q, k, v and KV splits have not."""
    llama = replace(PERSISTENT_MODELS["Llama 1B"], layers=1)
    cc = (9, 0)
    spec = RankKernels(Sharding(llama, 2), Chip(SMS, SHARED_BYTES[cc], cc)).planned["persistent_rank"].spec
    ptx = make_ptx(spec.make(), spec, cc)
    _, log = assemble(ptx, cc)
    assert number(r"(\d+) bytes spill stores", log) == number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert not float64_arithmetic(ptx)
    for access in ("st.relaxed.sys.global.b64", "ld.relaxed.sys.global.v2.b64", "st.relaxed.gpu", "ld.relaxed.gpu"):
        assert access in ptx
    assert ptx.count("st.relaxed.sys") % 2 == 0, "each word goes to both ranks"
