"""The persistent kernel of a rank compiled down to machine code: no GPU, driver or toolkit is needed."""

import re
from dataclasses import replace

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from kernel_catalogue import PERSISTENT_MODELS, SHARED_BYTES, SMS  # noqa: E402

from numba_atomflow.backends.cuda.tensor_parallel.kernels import RankKernels  # noqa: E402
from numba_atomflow.model.presets import PRESETS  # noqa: E402
from numba_atomflow.model.sharding import Sharding  # noqa: E402
from numba_atomflow.ops.cuda.persistent.schedule import DOWN  # noqa: E402
from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.runtime.chip import Chip  # noqa: E402
from numba_atomflow.ops.cuda.runtime.spec import KernelSpec  # noqa: E402

CC = (9, 0)
LLAMA = replace(PERSISTENT_MODELS["Llama 1B"], layers=1)
LLAMA_3B = replace(PRESETS["llama-3.2-3b"], layers=1)


def compiled(spec: KernelSpec) -> str:
    """PTX. There are no spills, no stack, no local memory and no float64."""
    ptx = make_ptx(spec.make(), spec, CC)
    _, log = assemble(ptx, CC)
    assert number(r"(\d+) bytes spill stores", log) == number(r"(\d+) bytes stack frame", log) == 0
    assert not re.search(r"\.local\b", ptx)
    assert not float64_arithmetic(ptx)
    return ptx


@pytest.mark.slow
def test_machine_code() -> None:
    """Words that cross have system scope, those of q, k, v and KV splits have not."""
    ptx = compiled(RankKernels(Sharding(LLAMA, 2), Chip(SMS, SHARED_BYTES[CC], CC)).planned["persistent_rank"].spec)
    for access in ("st.relaxed.sys.global.b64", "ld.relaxed.sys.global.v2.b64", "st.relaxed.gpu", "ld.relaxed.gpu"):
        assert access in ptx
    assert ptx.count("st.relaxed.sys") % 2 == 0, "each word goes to both ranks"


@pytest.mark.slow
def test_machine_code_of_several_columns() -> None:
    """With 8 columns, the widest kernel. The inputs of o and down are loaded 16 bytes at a time, and cleared so, in the
    rank's own memory; their words are stored one by one, to both ranks.
    """
    kernels = RankKernels(Sharding(LLAMA_3B, 2), Chip(SMS, SHARED_BYTES[CC], CC))
    assert kernels.wide_shapes[8].plans[DOWN].k_halves
    ptx = compiled(kernels.wide[8].spec)
    words = {"attention": 2, "attention in KV splits": 4, "gate_up": 1}
    assert ptx.count("st.relaxed.sys.global.b32") == kernels.sharding.ranks * sum(words.values())
    assert ptx.count("st.relaxed.sys.global.b64") % kernels.sharding.ranks == 0, "each flagged word, too"
    for access in ("ld.relaxed.sys.global.v4.b32", "ld.relaxed.sys.global.v2.b64", "st.global.v4.u32"):
        assert access in ptx
    for access in ("ld.relaxed.gpu.global.v2.b64", "st.relaxed.gpu.global.b64"):
        assert access in ptx, "q, k, v, KV splits, and the sums of half of K"
    assert not re.search(r"relaxed\.gpu\.global\.(v4\.)?b32", ptx)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2, 4])
def test_machine_code_of_a_large_model(columns: int) -> None:
    """70B: with 4 columns, half of the inputs of down fit into shared memory."""
    large = replace(PRESETS["llama-3.3-70b"], layers=1)
    kernels = RankKernels(Sharding(large, 2), Chip(SMS, SHARED_BYTES[CC], CC))
    assert kernels.wide_shapes[columns].plans[DOWN].k_halves == (columns == 4)
    compiled(kernels.wide[columns].spec)


def test_what_an_observed_op_reads_goes_to_the_ranks_that_read_it() -> None:
    kernels = RankKernels(Sharding(LLAMA, 2), Chip(SMS, SHARED_BYTES[CC], CC))
    ptx = compiled(kernels.publish.spec)
    words = {"to all": 4, "own": 5}  # residual stream twice, attention, MLP; the same exactly twice, q, k, v
    assert ptx.count("st.relaxed.sys.global") == kernels.sharding.ranks * words["to all"]
    assert ptx.count("st.relaxed.gpu.global") == words["own"]
