"""Approximate float32 functions of the hardware, and random numbers."""

import numpy as np

from numba_atomflow.ops.ptx.core import f32, instruction, u64


@instruction("rsqrt.approx.ftz.f32 $0, $1;", (f32,), (f32,))
def rsqrt(x):
    """1 / sqrt(x) of a positive normal number; relative error about 2^-22.9."""
    return np.float32(1.0 / np.sqrt(np.float64(x)))


@instruction("rcp.approx.ftz.f32 $0, $1;", (f32,), (f32,))
def reciprocal(x):
    """1 / x; relative error 2^-23, results below 2^-126 become 0."""
    with np.errstate(divide="ignore"):
        value = np.float32(1.0) / np.float32(x)
    return value if not abs(value) < 2.0**-126 else np.float32(0.0)


@instruction("max.f32 $0, $1, $2;", (f32,), (f32, f32))
def max_f32(x, y):
    """The greater of two numbers; of a NaN and a number, the number. Python's `max` compiles to two instructions."""
    return np.fmax(np.float32(x), np.float32(y))


@instruction("fma.rn.f32 $0, $1, $2, $3;", (f32,), (f32, f32, f32))
def fma(x, y, z):
    """x * y + z, rounded once."""
    return np.float32(np.float64(x) * np.float64(y) + np.float64(z))


@instruction("div.full.f32 $0, $1, $2;", (f32,), (f32, f32))
def divide(x, y):
    """x / y; relative error at most 2 units in the last place, for |y| up to 2^126."""
    return np.float32(np.float64(x) / np.float64(y))


@instruction("ex2.approx.ftz.f32 $0, $1;", (f32,), (f32,))
def exp2(x):
    """2^x; relative error about 2^-22, results below 2^-126 become 0."""
    with np.errstate(over="ignore"):
        value = np.exp2(np.float64(max(float(x), -1000.0)))
        return np.float32(value if value >= 2.0**-126 else 0.0)


@instruction(
    "{ .reg .u64 z, t; add.u64 z, $2, 1; mul.lo.u64 z, z, 0x9E3779B97F4A7C15; add.u64 z, z, $1;"
    " shr.u64 t, z, 30; xor.b64 z, z, t; mul.lo.u64 z, z, 0xBF58476D1CE4E5B9;"
    " shr.u64 t, z, 27; xor.b64 z, z, t; mul.lo.u64 z, z, 0x94D049BB133111EB;"
    " shr.u64 t, z, 31; xor.b64 z, z, t; shr.u64 $0, z, 11; }",
    (u64,),
    (u64, u64),
)
def random_53_bits(seed, counter):
    """Draw number `counter` of the stream `seed`: SplitMix64's finaliser, as `numba_atomflow.sampling.uniform`."""
    mask = (1 << 64) - 1
    z = (int(seed) + (int(counter) + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 11
