"""Device functions as edits of activations: the kernel against NumPy, in the simulator and on a GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from kernel_cases import generator, launch, poisoned
from numba import cuda
from numpy.typing import NDArray

from numba_atomflow.ops.cuda.token.edit import THREADS, EditArguments, HalfEditArguments, make_edit

# Multiples of 2^-9: products with positions are exact, whether or not the compiler fuses them with the addition.
DIRECTION = (np.arange(-350, 350) / 512).astype(np.float32)


@cuda.jit(device=True)
def steer(row: Any, column: Any, position: Any) -> Any:
    """Adds an array from outside of the function, more of it at later positions."""
    return row[column] + np.float32(position) * DIRECTION[column]


@cuda.jit(device=True)
def reverse(row: Any, column: Any, _position: Any) -> Any:
    """Reads what another thread replaces."""
    return row[row.size - 1 - column]


@cuda.jit(device=True)
def forbid_even(row: Any, column: Any, _position: Any) -> Any:
    """As edits of logits do."""
    return row[column] if column % 2 else -np.inf


@cuda.jit(device=True)
def overflow(row: Any, column: Any, _position: Any) -> Any:
    """Float32 has room for it, float16 has not."""
    return row[column] + (np.float32(1e5) if column == 3 else np.float32(0.0))


class EditCase(NamedTuple):
    """A function, what it computes of rows [rows, width] and positions [rows, 1], and the shape of the activation."""

    function: Any
    expected: Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[Any]]
    rows: int
    width: int
    half: bool = False
    is_cached: bool = False
    least: float | None = None
    faulty: bool = False

    def __str__(self) -> str:
        kind = "half" if self.half else "single"
        return f"{self.expected.__name__}-{self.rows}x{self.width}-{kind}{'-cached' * self.is_cached}"


def steered(rows: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[Any]:
    return rows + positions.astype(np.float32) * DIRECTION[: rows.shape[1]]


def reversed_rows(rows: NDArray[np.float32], _positions: NDArray[np.int64]) -> NDArray[Any]:
    return rows[:, ::-1]


def without_even(rows: NDArray[np.float32], _positions: NDArray[np.int64]) -> NDArray[Any]:
    return np.where(np.arange(rows.shape[1]) % 2, rows, -1e30)


def without_odd_limit(rows: NDArray[np.float32], _positions: NDArray[np.int64]) -> NDArray[Any]:
    return np.where(np.arange(rows.shape[1]) % 2, rows, -np.inf)


def overflowed(rows: NDArray[np.float32], _positions: NDArray[np.int64]) -> NDArray[Any]:
    return rows + np.where(np.arange(rows.shape[1]) == 3, np.float32(1e5), np.float32(0))


EDITS = (
    EditCase(steer, steered, rows=3, width=192),
    EditCase(steer, steered, rows=1, width=700),  # more columns than threads
    EditCase(reverse, reversed_rows, rows=2, width=600),
    EditCase(reverse, reversed_rows, rows=1, width=65, half=True),
    EditCase(steer, steered, rows=2, width=128, half=True, is_cached=True),
    EditCase(forbid_even, without_even, rows=1, width=288, least=-1e30),
    EditCase(forbid_even, without_odd_limit, rows=1, width=64, faulty=True),
    EditCase(overflow, overflowed, rows=1, width=64, half=True, faulty=True),
    EditCase(overflow, overflowed, rows=1, width=64),
)


def check_edit(case: EditCase) -> None:
    """Every bit: the functions only add and move. Nothing but the rows of the step is written."""
    position, pitch = 4, case.width if case.is_cached else case.width + 3
    dtype: Any = np.float16 if case.half else np.float32
    first = position if case.is_cached else 0
    values = generator(case.rows, case.width).standard_normal((first + case.rows + 1, pitch)).astype(dtype)
    before, step = values.copy(), slice(first, first + case.rows)
    signature: Any = HalfEditArguments if case.half else EditArguments
    flat, fault = values.reshape(-1), np.zeros(1, np.int32)
    if case.half:
        flat = flat.view(np.uint16)
    arguments = signature(
        values=flat,
        old=poisoned(case.rows * case.width),
        position=np.array([position]),
        fault=fault,
        width=case.width,
        pitch=pitch,
        is_cached=int(case.is_cached),
    )
    launch(make_edit(case.function, case.least, half=case.half), case.rows, THREADS, 0, arguments)
    positions = position + np.arange(case.rows)[:, None]
    rows = before[step, : case.width].astype(np.float32)
    with np.errstate(over="ignore"):
        before[step, : case.width] = case.expected(rows, positions).astype(dtype)
    np.testing.assert_array_equal(values, before)
    assert fault[0] == case.faulty
