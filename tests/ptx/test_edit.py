"""Edits by device functions, compiled: without spills, and without float64 that the function does not ask for."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from machine_code import float64_arithmetic, number, skip_without_compiler

skip_without_compiler()

from edit_cases import steer  # noqa: E402
from numba import cuda  # noqa: E402

from numba_atomflow.backends.cuda.edits import compile_edit  # noqa: E402
from numba_atomflow.errors import OptionError  # noqa: E402
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


LARGE = np.ones(20_000, np.float32)


@cuda.jit(device=True)
def without_result(_row: Any, _column: Any, _position: Any) -> None:
    pass


@cuda.jit(device=True)
def of_an_unknown_name(row: Any, column: Any, _position: Any) -> Any:
    return row[column] * unknown  # type: ignore[name-defined]  # noqa: F821


@cuda.jit(device=True)
def of_a_large_array(_row: Any, column: Any, _position: Any) -> Any:
    return LARGE[column]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (without_result, "Casting none to float32 directly is unsupported"),
        (of_an_unknown_name, "NameError: name 'unknown' is not defined"),
        pytest.param(of_a_large_array, "File uses too much global constant data", marks=pytest.mark.slow),
    ],
    ids=["no result", "unknown name", "large array"],
)
def test_the_cause_is_named(function: Any, reason: str) -> None:
    edit: Any = SimpleNamespace(function=function, activation=SimpleNamespace(name="layer.0.output"))
    with pytest.raises(OptionError) as error:
        compile_edit(edit, None, (9, 0), half=False)
    assert reason in str(error.value)
    assert str(error.value).isprintable()
