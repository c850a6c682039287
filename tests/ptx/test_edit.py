"""Edits by device functions, compiled: without spills, and without float64 that the function does not ask for."""

import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from edit_cases import steer  # noqa: E402

from numba_atomflow.ops.cuda.runtime.build import assemble, make_ptx  # noqa: E402
from numba_atomflow.ops.cuda.token.edit import edit_spec, make_edit  # noqa: E402


@pytest.mark.parametrize("half", [pytest.param(False, marks=pytest.mark.slow), True], ids=["single", "half"])
def test_an_edit_compiles_with_the_arrays_that_it_refers_to(half: bool) -> None:
    ptx = make_ptx(make_edit(steer, -1e30, half=half), edit_spec(half=half), (9, 0))
    code, log = assemble(ptx, (9, 0))
    assert edit_spec(half=half).name.encode() in code
    assert ".const" in ptx
    assert number(r"(\d+) bytes spill stores", log) == 0
    assert not float64_arithmetic(ptx)
