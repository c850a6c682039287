"""Explicit SIMD for prompts: one tile of online softmax, with a query in each lane.

Scores come transposed, [keys, COLUMNS]: the row of a key has the scores of COLUMNS queries, so that maxima and sums are
taken lane by lane. The exponential is the polynomial of ops/activation.py.

Cost model: 20 vector operations per key and LANES queries, a tenth of the products beside it.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numba_atomflow.ops.activation import LN_2_HIGH, LN_2_LOW, LOG2_E, SERIES
from numba_atomflow.ops.simd_gemm import (
    COLUMNS,
    FLOATS,
    FUSE,
    LANES,
    VECTORS,
    WORDS,
    data_of,
    floats,
    load,
    multiply_add,
    splat,
    store,
)

LOWEST = -3.0e38  # below every score
_ROUND = 1.5 * 2.0**23  # added to a float32 below 2^22, it leaves the nearest integer in the low bits
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_INDEX = types.int64


@intrinsic
def softmax_tile(typing_context, scores, keys, key, query, state):
    """Scores to weights exp(score - running maximum), and the maxima and sums brought up to date.

    Query i has position query + i; it sees row s of the scores if key + s <= query + i. Other weights are 0.

    Args:
        scores: float32, contiguous, rows [keys, COLUMNS]; weights afterwards.
        keys: rows. key: position of row 0. query: position of query 0.
        state: float32 [3 * COLUMNS], contiguous: running maxima (LOWEST before the first tile), running sums (0), and,
            out, the factor by which sums from before this tile are to be multiplied.
    """
    del typing_context, keys, key, query
    signature = types.void(scores, _INDEX, _INDEX, _INDEX, state)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, keys, key, query, _) = builder, args
        scores, state = (data_of(context, b, signature.args[i], args[i]) for i in (0, 4))
        ahead = b.trunc(b.sub(key, query), _I32)  # query i sees row s if s + ahead <= i
        old = [load(b, state, _I64(v * LANES)) for v in range(VECTORS)]
        maxima, totals = ([cgutils.alloca_once(b, FLOATS) for _ in old] for _ in range(2))
        for value, maximum, total in zip(old, maxima, totals, strict=True):
            b.store(value, maximum)
            b.store(floats(0.0), total)

        def row(index: ir.Value, v: int) -> tuple[ir.Value, ir.Value]:
            """Where the scores of a key are, and which lanes see it."""
            lane = ir.Constant(WORDS, [v * LANES + i for i in range(LANES)])
            first = splat(b, b.add(b.trunc(index, _I32), ahead), WORDS)
            return b.add(b.mul(index, _I64(COLUMNS)), _I64(v * LANES)), b.icmp_signed("<=", first, lane)

        with cgutils.for_range(b, keys, intp=_I64) as loop:
            for v, maximum in enumerate(maxima):
                place, seen = row(loop.index, v)
                score = b.select(seen, load(b, scores, place), floats(LOWEST))
                larger = b.fcmp_ordered(">", score, b.load(maximum))
                b.store(b.select(larger, score, b.load(maximum)), maximum)
        with cgutils.for_range(b, keys, intp=_I64) as loop:
            for v, (maximum, total) in enumerate(zip(maxima, totals, strict=True)):
                place, seen = row(loop.index, v)
                weight = exp_vector(b, b.fsub(load(b, scores, place), b.load(maximum), flags=PLAIN))
                weight = b.select(seen, weight, floats(0.0))
                store(b, weight, scores, place)
                b.store(b.fadd(b.load(total), weight, flags=PLAIN), total)
        for v, (value, maximum, total) in enumerate(zip(old, maxima, totals, strict=True)):
            factor = exp_vector(b, b.fsub(value, b.load(maximum), flags=PLAIN))
            running_max, running_sum, factors = (_I64(part * COLUMNS + v * LANES) for part in range(3))
            store(b, b.load(maximum), state, running_max)
            store(b, multiply_add(b, load(b, state, running_sum), factor, b.load(total)), state, running_sum)
            store(b, factor, state, factors)
        return context.get_dummy_value()

    return signature, codegen


PLAIN = ("nsz",)  # any flag of its own keeps numba from adding "reassoc", with which rounding by _ROUND would vanish


def exp_vector(b: ir.IRBuilder, x: ir.Value, fuse: tuple[str, ...] = FUSE) -> ir.Value:
    """e^x in every lane of a vector of any length, for x <= 88; below -87 the value there, NaN for NaN.

    With `fuse` = PLAIN, no multiply and add become one FMA. LLVM may forget that they should where it sees that only
    one lane is used, and then the bits of a lane would depend on the use of the others.
    """
    lanes, words_type = x.type.count, ir.VectorType(_I32, x.type.count)

    def every(value: float) -> ir.Constant:
        return ir.Constant(x.type, [value] * lanes)

    x = b.select(b.fcmp_ordered("<", x, every(-87.0)), every(-87.0), x)
    shifted = b.fadd(b.fmul(x, every(LOG2_E), flags=PLAIN), every(_ROUND), flags=PLAIN)
    n = b.fsub(shifted, every(_ROUND), flags=PLAIN)
    r = multiply_add(b, n, every(-LN_2_HIGH), x, fuse)
    r = multiply_add(b, n, every(-LN_2_LOW), r, fuse)
    series = every(SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = multiply_add(b, series, r, every(coefficient), fuse)
    series = multiply_add(b, b.fmul(r, r, flags=PLAIN), series, r, fuse)
    shift, bias = (ir.Constant(words_type, [value] * lanes) for value in (23, 127 << 23))
    exponent = b.add(b.shl(b.bitcast(shifted, words_type), shift), bias)
    return b.fmul(b.fadd(series, every(1.0), flags=PLAIN), b.bitcast(exponent, x.type), flags=PLAIN)
