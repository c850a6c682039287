"""Small functions shared by kernels: a vectorisable exponential, SiLU and GELU.

``math.exp`` is a library call per element, which LLVM cannot put into SIMD lanes. Softmax over a long context and
SwiGLU would spend more time there than in their matrix work, so `exp` is range reduction plus a polynomial instead:
relative error at most 5e-7 (1.7e-7 of it from ending the series), clamped to [-87, 88], where float32 ends.
"""

import math

import numpy as np
from numpy.typing import NDArray

from numba_atomflow.ops.jit import cpu_kernel

LOG2_E = math.log2(math.e)
LN_2_HIGH = 0.693359375  # 9 bits: n * high is exact for |n| < 2^15
LN_2_LOW = math.log(2.0) - LN_2_HIGH
SERIES = tuple(1.0 / math.factorial(n) for n in range(2, 7))  # coefficients of e^r from r^2 on

_LOG2_E, _LN_2_HIGH, _LN_2_LOW = np.float32(LOG2_E), np.float32(LN_2_HIGH), np.float32(LN_2_LOW)
_GELU_SCALE, _GELU_CUBE = np.float32(math.sqrt(2.0 / math.pi)), np.float32(0.044715)
_C2, _C3, _C4, _C5, _C6 = (np.float32(coefficient) for coefficient in SERIES)


def silu_reference(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """x * sigmoid(x), any shape."""
    return x / (1.0 + np.exp(-x))


@cpu_kernel(inline=True)
def exp(x):
    """e^x for one float32; arguments outside [-87, 88] give the value at the edge."""
    x = min(max(np.float32(x), np.float32(-87.0)), np.float32(88.0))
    turns = x * _LOG2_E
    whole = np.int32(turns + (np.float32(0.5) if turns > 0 else np.float32(-0.5)))  # to nearest; floor is a scalar call
    n = np.float32(whole)
    r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW  # |r| <= ln(2) / 2
    tail = _C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6)))
    power_of_two = np.int32((whole + 127) << 23).view(np.float32)
    return np.float32((np.float32(1.0) + (r + r * r * tail)) * power_of_two)


def gelu_reference(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """GELU with its approximation by tanh, any shape. Source: Hendrycks and Gimpel (2016)."""
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@cpu_kernel(inline=True)
def gelu(x):
    """The same for one float32, as x * sigmoid(2 u), which equals x * (1 + tanh(u)) / 2."""
    u = _GELU_SCALE * (x + _GELU_CUBE * x * x * x)
    return np.float32(x / (np.float32(1.0) + exp(np.float32(-2.0) * u)))


@cpu_kernel(inline=True)
def silu(x):
    """x * sigmoid(x) for one float32."""
    return np.float32(x / (np.float32(1.0) + exp(-x)))
