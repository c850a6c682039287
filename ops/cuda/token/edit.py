"""An activation changed by a device function of the caller, inside a step.

Each CTA has a row: it keeps a copy of it in float32, and puts what the function makes of the copy in its place. Cost
model: a launch (2-3 us), and what the function does; bytes are negligible.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numba import cuda, int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.runtime.spec import F32, I32, I64, NUMBER, U16, KernelSpec, kernel_spec
from numba_atomflow.ops.cuda.scalars import f32, i32, u16, u32

THREADS = 512


class EditArguments(NamedTuple):
    """The kernel's parameter.

    Attributes:
        values: [rows, width], every `pitch` elements a row.
        old: [rows, width], scratch.
        position: [1], of the first row.
        fault: [1], set to 1 where a result is no finite number.
        is_cached: 1 if `values` has a row for every position, from 0 on; 0 if it begins with the first row.
    """

    values: F32
    old: F32
    position: I64
    fault: I32
    width: NUMBER
    pitch: NUMBER
    is_cached: NUMBER


class HalfEditArguments(NamedTuple):
    """The same with bits of float16 in `values`."""

    values: U16
    old: F32
    position: I64
    fault: I32
    width: NUMBER
    pitch: NUMBER
    is_cached: NUMBER


def make_edit(function: Any, least: float | None, *, half: bool) -> Any:
    """Kernel (`EditArguments`, or `HalfEditArguments` if `half`). Launch: a CTA of `THREADS` threads for each row.

    Args:
        function: a device function (row, column, position) -> what replaces row[column]; row is float32 [width].
        least: what is written for -inf; None: -inf is a fault as well.
    """
    load, store = (_load_half, _store_half) if half else (_load, _store)
    replaces_infinity, lowest = least is not None, f32(least or 0.0)

    @ptx.kernel(THREADS, 1)
    def edit(io):
        row = int64(cuda.blockIdx.x)
        width, position = io.width, io.position[0] + row
        first = (position if io.is_cached else row) * io.pitch
        old = io.old[row * width : (row + 1) * width]
        for column in range(cuda.threadIdx.x, width, THREADS):
            old[column] = load(io.values, first + column)
        cuda.syncthreads()
        for column in range(cuda.threadIdx.x, width, THREADS):
            new = f32(function(old, int64(column), position))
            if replaces_infinity and new == -math.inf:
                new = lowest
            if not math.isfinite(store(io.values, first + column, new)):
                io.fault[0] = i32(1)

    return edit


@ptx.device_function
def _load(values, index):
    return values[index]


@ptx.device_function
def _store(values, index, value):
    values[index] = value
    return value


@ptx.device_function
def _load_half(values, index):
    low, _ = ptx.unpack_f16x2(u32(values[index]))
    return low


@ptx.device_function
def _store_half(values, index, value):
    """Returns what was stored: a large float32 has become infinity."""
    bits = ptx.f16_bits(value)
    values[index] = u16(bits)
    stored, _ = ptx.unpack_f16x2(u32(bits))
    return stored


def edit_spec(*, half: bool) -> KernelSpec:
    """The launch configuration of the kernel. It is compiled in the caller's process (`build.make_ptx`), where the
    function is: functions of a script cannot be sent to another one.
    """
    factory: Callable[..., Any] = make_edit
    signature = HalfEditArguments if half else EditArguments
    return kernel_spec("edit_half" if half else "edit", factory, signature, THREADS)
