"""Functions of single elements that some families have in place of, or beside, others: soft caps and GELU.

Both are made of exp2 (`ex2.approx`, 2 ulp), not of `tanh.approx`, whose error of 2^-11 would be that of a float16:
tanh(x) = 1 - 2 / (1 + e^2x), with an absolute error of some 1e-7, times the cap; where e^2x is infinite, it is 1. The
reciprocal is `rcp.approx` (1 ulp): the exact division is a subroutine, around which scores would be spilled.
"""

import math
from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32

_ONE, _TWO = f32(1.0), f32(2.0)
_LOG2_E = math.log2(math.e)
_GELU_SCALE, _GELU_CUBE = f32(-2.0 * _LOG2_E * math.sqrt(2.0 / math.pi)), f32(0.044715)


def make_soft_cap(cap: float, scale: float = 1.0, unit: float = 1.0) -> Any:
    """Device function (x) -> unit * cap * tanh(scale * x / cap)."""
    inner, outer = f32(2.0 * _LOG2_E * scale / cap), f32(unit * cap)

    @ptx.device_function
    def soft_cap(x):
        return outer * (_ONE - _TWO * ptx.reciprocal(_ONE + ptx.exp2(x * inner)))

    return soft_cap


@ptx.device_function
def geglu(gate, up):
    """gelu(gate) * up, of GELU's approximation by tanh: x * sigmoid(2 u), which equals x * (1 + tanh(u)) / 2."""
    cubed = gate + _GELU_CUBE * gate * gate * gate
    return gate * ptx.reciprocal(_ONE + ptx.exp2(cubed * _GELU_SCALE)) * up
