"""Explicit SIMD for attention of few tokens: one query times a run of keys, and weights times a run of values.

Each result is made in one order of sums, wherever a run begins or ends, and no operation may be reordered by the
compiler: a query has the same bits whatever queries are beside it, over a contiguous cache and over a paged one.

Cost model: per key a multiply-add for each VECTOR elements of a head, and a share of 3 operations in the sums over
lanes, which 8 keys make together; per value a multiply-add for each VECTOR elements.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numba_atomflow.ops.simd_gemm import FUSE, data_of
from numba_atomflow.ops.simd_softmax import LOWEST, PLAIN, exp_vector
from numba_atomflow.ops.simd_vectors import FLOATS, RESULTS, VECTOR, shuffle, splat, splat_of, sums_of_lanes

_KEYS = 8  # that are multiplied together: the lanes of RESULTS
_VALUES = 4  # vectors of the result that stay in registers

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INDEX = types.int64


@intrinsic
def score_keys(typing_context, query, keys, row, start, count, scale, scores, place):
    """scores[place + s] = scale * sum over d of query[d] * keys[row + s, start + d], for s < count.

    Args:
        query: float32 [head_dim], contiguous.
        keys: float32 [rows, kv_heads * head_dim], contiguous rows.
        row, start: of the first key, and its head's first element.
        scores: float32, contiguous.
    """
    del typing_context, row, start, count, scale, place
    signature = types.void(query, keys, _INDEX, _INDEX, _INDEX, types.float32, scores, _INDEX)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, _, row, start, count, scale, _, place) = builder, args
        query, head_dim = _vector(context, b, signature.args[0], args[0])
        keys, stride = _rows(context, b, signature.args[1], args[1], row, start)
        scores = b.gep(data_of(context, b, signature.args[6], args[6]), [place])
        groups = b.sdiv(count, _I64(_KEYS))

        def products(first: ir.Value, keys_at_once: int) -> ir.Value:
            """Scores of these keys, one in each lane."""
            rows = [b.gep(keys, [b.mul(b.add(first, _I64(i)), stride)]) for i in range(keys_at_once)]
            return b.fmul(_dot_products(b, query, rows, head_dim), splat(b, scale, RESULTS), flags=PLAIN)

        with cgutils.for_range(b, groups, intp=_I64) as loop:
            first = b.mul(loop.index, _I64(_KEYS))
            b.store(products(first, _KEYS), b.bitcast(b.gep(scores, [first]), RESULTS.as_pointer()), align=4)
        done = b.mul(groups, _I64(_KEYS))
        with cgutils.for_range(b, b.sub(count, done), intp=_I64) as loop:
            s = b.add(done, loop.index)
            b.store(b.extract_element(products(s, 1), _I32(0)), b.gep(scores, [s]))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def softmax_weights(typing_context, scores, length):
    """scores[s] to exp(scores[s] - their maximum), in place, for s < length; their sum.

    Args:
        scores: float32, contiguous. A NaN makes the sum NaN.
        length: at least 1.
    """
    del typing_context, length
    signature = types.float32(scores, _INDEX)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, length = builder, args[1]
        scores = data_of(context, b, signature.args[0], args[0])
        vectors = b.sdiv(length, _I64(VECTOR))
        done = b.mul(vectors, _I64(VECTOR))
        rest = cgutils.alloca_once_value(b, splat_of(LOWEST, FLOATS))  # what is left, and behind it nothing
        elements = b.bitcast(rest, _F32.as_pointer())
        with cgutils.for_range(b, b.sub(length, done), intp=_I64) as loop:
            b.store(b.load(b.gep(scores, [b.add(done, loop.index)])), b.gep(elements, [loop.index]))

        maxima = cgutils.alloca_once_value(b, b.load(rest))
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            b.store(_larger(b, b.load(maxima), _load(b, scores, _vector_at(b, loop.index), FLOATS)), maxima)
        largest = splat(b, _largest_lane(b, b.load(maxima)), FLOATS)

        weights = exp_vector(b, b.fsub(b.load(rest), largest, flags=PLAIN))
        b.store(weights, rest)
        totals = cgutils.alloca_once_value(b, weights)
        with cgutils.for_range(b, b.sub(length, done), intp=_I64) as loop:
            b.store(b.load(b.gep(elements, [loop.index])), b.gep(scores, [b.add(done, loop.index)]))
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            at = _vector_at(b, loop.index)
            weights = exp_vector(b, b.fsub(_load(b, scores, at, FLOATS), largest, flags=PLAIN))
            b.store(weights, b.bitcast(b.gep(scores, [at]), FLOATS.as_pointer()), align=4)
            b.store(b.fadd(b.load(totals), weights, flags=PLAIN), totals)
        return b.extract_element(sums_of_lanes(b, [b.load(totals)]), _I32(0))

    return signature, codegen


@intrinsic
def add_values(typing_context, weights, place, values, row, start, count, result):
    """result[d] += sum over s of weights[place + s] * values[row + s, start + d], for s < count, in order of s.

    Args:
        weights: float32, contiguous.
        values: float32 [rows, kv_heads * head_dim], contiguous rows.
        row, start: of the first value, and its head's first element.
        result: float32 [head_dim], contiguous.
    """
    del typing_context, place, row, start, count
    signature = types.void(weights, _INDEX, values, _INDEX, _INDEX, _INDEX, result)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, place, _, row, start, count, _) = builder, args
        weights = b.gep(data_of(context, b, signature.args[0], args[0]), [place])
        values, stride = _rows(context, b, signature.args[2], args[2], row, start)
        result, head_dim = _vector(context, b, signature.args[6], args[6])

        def add(first: ir.Value, vectors: int, kind: ir.Type) -> None:
            """To elements first .. of the result: this number of vectors, or of single elements."""
            width = kind.count if isinstance(kind, ir.VectorType) else 1
            offsets = [b.add(first, _I64(i * width)) for i in range(vectors)]
            totals = [cgutils.alloca_once(b, kind) for _ in offsets]
            for offset, total in zip(offsets, totals, strict=True):
                b.store(_load(b, result, offset, kind), total)
            with cgutils.for_range(b, count, intp=_I64) as loop:
                weight = b.load(b.gep(weights, [loop.index]))
                factor = splat(b, weight, kind) if isinstance(kind, ir.VectorType) else weight
                at = b.gep(values, [b.mul(loop.index, stride)])
                for offset, total in zip(offsets, totals, strict=True):
                    product = b.fmul(factor, _load(b, at, offset, kind), flags=FUSE)
                    b.store(b.fadd(b.load(total), product, flags=FUSE), total)
            for offset, total in zip(offsets, totals, strict=True):
                b.store(b.load(total), b.bitcast(b.gep(result, [offset]), kind.as_pointer()), align=4)

        done: ir.Value = _I64(0)
        for vectors, kind in ((_VALUES, FLOATS), (1, FLOATS), (1, _F32)):
            step = vectors * (VECTOR if kind is FLOATS else 1)
            turns = b.sdiv(b.sub(head_dim, done), _I64(step))
            with cgutils.for_range(b, turns, intp=_I64) as loop:
                add(b.add(done, b.mul(loop.index, _I64(step))), vectors, kind)
            done = b.add(done, b.mul(turns, _I64(step)))
        return context.get_dummy_value()

    return signature, codegen


def _larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two numbers in each lane; x where one is NaN."""
    return b.select(b.fcmp_ordered(">", y, x), y, x)


def _largest_lane(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """The largest of the lanes."""
    for distance in (8, 4, 2, 1):
        vector = _larger(b, vector, shuffle(b, vector, vector, [i ^ distance for i in range(VECTOR)]))
    return b.extract_element(vector, _I32(0))


def _vector_at(b: ir.IRBuilder, index: ir.Value) -> ir.Value:
    return b.mul(index, _I64(VECTOR))


def _dot_products(b: ir.IRBuilder, query: ir.Value, rows: Sequence[ir.Value], head_dim: ir.Value) -> ir.Value:
    """The query times each of up to 8 rows: one in each lane."""
    totals = [cgutils.alloca_once(b, FLOATS) for _ in rows]
    for total in totals:
        b.store(splat_of(0.0, FLOATS), total)
    vectors = b.sdiv(head_dim, _I64(VECTOR))
    with cgutils.for_range(b, vectors, intp=_I64) as loop:
        d = b.mul(loop.index, _I64(VECTOR))
        part = _load(b, query, d, FLOATS)
        for row, total in zip(rows, totals, strict=True):
            product = b.fmul(part, _load(b, row, d, FLOATS), flags=FUSE)
            b.store(b.fadd(b.load(total), product, flags=FUSE), total)
    done = b.mul(vectors, _I64(VECTOR))
    rest = cgutils.alloca_once(b, RESULTS)
    b.store(splat_of(0.0, RESULTS), rest)
    with cgutils.for_range(b, b.sub(head_dim, done), intp=_I64) as loop:
        d = b.add(done, loop.index)
        elements = splat_of(0.0, RESULTS)
        for i, row in enumerate(rows):
            elements = b.insert_element(elements, b.load(b.gep(row, [d])), _I32(i))
        product = b.fmul(splat(b, b.load(b.gep(query, [d])), RESULTS), elements, flags=PLAIN)
        b.store(b.fadd(b.load(rest), product, flags=PLAIN), rest)
    return b.fadd(sums_of_lanes(b, [b.load(total) for total in totals]), b.load(rest), flags=PLAIN)


def _vector(context: Any, b: ir.IRBuilder, kind: Any, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Pointer to a contiguous array's first element, and its length."""
    array = context.make_array(kind)(context, b, value)
    return array.data, cgutils.unpack_tuple(b, array.shape)[0]


def _rows(
    context: Any, b: ir.IRBuilder, kind: Any, value: ir.Value, row: ir.Value, start: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Pointer to element [row, start] of a float32 matrix, and the elements from one row to the next."""
    array = context.make_array(kind)(context, b, value)
    stride = b.sdiv(cgutils.unpack_tuple(b, array.strides)[0], _I64(4))
    return b.gep(array.data, [b.add(b.mul(row, stride), start)]), stride


def _load(b: ir.IRBuilder, data: ir.Value, offset: ir.Value, kind: ir.Type) -> ir.Value:
    return b.load(b.bitcast(b.gep(data, [offset]), kind.as_pointer()), align=4)
