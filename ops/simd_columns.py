"""Explicit SIMD for decode steps: a row of a weight times 1 to 8 columns (tokens).

Each vector of weights is loaded and converted once, and multiplied by one vector of every column. A column's sums are
made in one order, whatever the number of columns beside it, and no operation may be reordered by the compiler: a token
has the same bits in a step of any width. In lane i of VECTOR = 16: within a group of 128 the products of elements
i, i + 16, ... in order; then over groups, times their scales; then over lanes, as a tree.

Cost model: per 16 weights a load, a sign extension, a shift and a mask, and per column a multiply-add with one operand
in memory. With AVX-512 that is a cycle and a half for the weights and half a cycle for a column. Left to LLVM, the loop
becomes one chain of dependent multiply-adds; here those of the next group begin while one group's end. Weights are
prefetched 2 KB ahead: rows are short, and a processor's own prefetching begins anew with every page of 4 KB.

The modules simd*.py are to the CPU what `ops.ptx` is to the GPU: no other CPU module uses the compiler's extension API.
The vector operations are LLVM's portable ones: they become AVX2, AVX-512, NEON, or scalar code.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numba_atomflow.ops.fp8 import GROUP, MAGNITUDE_AND_SIGN
from numba_atomflow.ops.simd import has_half_conversion, widened
from numba_atomflow.ops.simd_gemm import FUSE
from numba_atomflow.ops.simd_softmax import PLAIN, exp_vector
from numba_atomflow.ops.simd_vectors import FLOATS, RESULTS, VECTOR, splat, splat_of, sums_of_lanes

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_CODES, _HALF_BITS, _HALVES, _WORDS = (ir.VectorType(kind, VECTOR) for kind in (_I8, _I16, ir.HalfType(), _I32))
# Multiplies and adds of whole vectors of weights become FMAs where the processor has them (FUSE); on results, of which
# LLVM may compute the used lanes only, nothing is fused (PLAIN).
_UNLIFT = 2.0**56
_AHEAD, _LINE = 2048, 64  # bytes: how far ahead of their use weights are prefetched, and of a cache line


@intrinsic
def multiply_row(typing_context, codes, scales, n, x, y, tokens, accumulate, width):
    """y[t, n] = sum over k of weight[n, k] * x[t, k], or += the sum, for t < tokens.

    Args:
        codes: int8 [N, K], C-contiguous. For a float16 weight: int16, its bits.
        scales: float32 [N, ceil(K / 128)], C-contiguous. For a float16 weight: None.
        n: row.
        x: float32 [width, K], C-contiguous. For FP8 times 2^64: codes convert to their values times 2^-120, and with
            it products stay far from float32's subnormal range, where arithmetic is slow and inexact.
        y: float32 [at least tokens, N].
        accumulate: whether to add to y.
        width: columns that are multiplied, a literal from 1 to 8.
    """
    signature = types.void(codes, scales, types.int64, x, y, types.int64, types.boolean, width)
    del typing_context, tokens, accumulate
    if not isinstance(width, types.IntegerLiteral):
        return None  # numba asks again with the literal

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        _, _, n, _, y, tokens, accumulate, _ = args
        width = signature.args[7].literal_value
        results = _Weight(context, builder, signature.args, args, width).times_columns(n)

        def put(place: ir.Value, value: ir.Value) -> None:
            with builder.if_else(builder.icmp_unsigned("!=", accumulate, accumulate.type(0))) as (add, write):
                with add:
                    builder.store(builder.fadd(builder.load(place), value, flags=PLAIN), place)
                with write:
                    builder.store(value, place)

        _each_token(context, builder, signature.args[4], y, n, tokens, width, results, put)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def multiply_gate_up(typing_context, codes, scales, n, x, y, tokens, width):
    """y[t, n] = silu(gate[t, n]) * up[t, n] for t < tokens; arguments are those of `multiply_row`.

    The rows of `codes` are those of the gate, then as many of up.
    """
    signature = types.void(codes, scales, types.int64, x, y, types.int64, width)
    del typing_context, tokens
    if not isinstance(width, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, _, n, _, _, tokens, _) = builder, args
        width = signature.args[6].literal_value
        weight = _Weight(context, b, signature.args, args, width)
        gate, up = weight.times_columns(n), weight.times_columns(b.add(n, b.sdiv(weight.rows, _I64(2))))
        results = b.fmul(_silu(b, gate), up, flags=PLAIN)

        def put(place: ir.Value, value: ir.Value) -> None:
            b.store(value, place)

        _each_token(context, b, signature.args[4], args[4], n, tokens, width, results, put)
        return context.get_dummy_value()

    return signature, codegen


def _each_token(
    context: Any,
    b: ir.IRBuilder,
    y_type: Any,
    y: ir.Value,
    n: ir.Value,
    tokens: ir.Value,
    width: int,
    results: ir.Value,
    put: Callable[[ir.Value, ir.Value], None],
) -> None:
    """`put` lane t of the results to y[t, n] for t < tokens."""
    array = context.make_array(y_type)(context, b, y)
    for t in range(width):
        with b.if_then(b.icmp_signed("<", _I64(t), tokens)):
            place = cgutils.get_item_pointer(context, b, y_type, array, [_I64(t), n])
            put(place, b.extract_element(results, _I32(t)))


class _Weight:
    """Emits the product of a row of a weight and some columns."""

    def __init__(
        self, context: Any, builder: ir.IRBuilder, kinds: Sequence[Any], args: Sequence[Any], width: int
    ) -> None:
        self.builder = b = builder
        codes, x = (context.make_array(kinds[i])(context, b, args[i]) for i in (0, 3))
        self.codes = codes.data
        self.rows, self.in_features = cgutils.unpack_tuple(b, codes.shape)
        self.scales = self.groups = None
        if kinds[1] != types.none:
            scales = context.make_array(kinds[1])(context, b, args[1])
            self.scales, self.groups = scales.data, cgutils.unpack_tuple(b, scales.shape)[1]
        self.columns = [b.gep(x.data, [b.mul(_I64(c), self.in_features)]) for c in range(width)]
        self.has_halves = has_half_conversion(context.codegen())

    def times_columns(self, n: ir.Value) -> ir.Value:
        """Row n times every column: a vector with a column in each lane."""
        b = self.builder
        row = b.gep(self.codes, [b.mul(n, self.in_features)])
        scales = None if self.scales is None else b.gep(self.scales, [b.mul(n, self.groups)])
        totals = [cgutils.alloca_once_value(b, splat_of(0.0, FLOATS)) for _ in self.columns]
        whole_groups = b.sdiv(self.in_features, _I64(GROUP))
        with cgutils.for_range(b, whole_groups, intp=_I64) as loop:
            start = b.mul(loop.index, _I64(GROUP))
            self._prefetch(row, start)
            sums: list[ir.Value] = [None] * len(totals)
            for step in range(GROUP // VECTOR):
                offset = b.add(start, _I64(step * VECTOR))
                weights = self._weights(row, offset)
                sums = [self._product(weights, x, offset, s) for x, s in zip(self.columns, sums, strict=True)]
            self._add_scaled(sums, scales, loop.index, totals)

        covered = b.mul(whole_groups, _I64(GROUP))
        vectors = b.sdiv(b.sub(self.in_features, covered), _I64(VECTOR))
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            offset = b.add(covered, b.mul(loop.index, _I64(VECTOR)))
            weights = self._weights(row, offset)
            sums = [self._product(weights, x, offset, None) for x in self.columns]
            self._add_scaled(sums, scales, whole_groups, totals)

        covered = b.add(covered, b.mul(vectors, _I64(VECTOR)))
        rest = self._single_elements(row, scales, covered, whole_groups)
        results = b.fadd(sums_of_lanes(b, [b.load(total) for total in totals]), rest, flags=PLAIN)
        return results if scales is None else b.fmul(results, splat_of(_UNLIFT, RESULTS), flags=PLAIN)

    def _prefetch(self, row: ir.Value, start: ir.Value) -> None:
        """Ask for what lies _AHEAD bytes behind the group that begins at `start`: rows follow one another in memory."""
        b = self.builder
        bytes_per_weight = row.type.pointee.width // 8
        begin = b.bitcast(b.gep(row, [start]), _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
        for line in range(0, GROUP * bytes_per_weight, _LINE):
            address = b.gep(begin, [_I64(_AHEAD + line)])
            b.call(prefetch, [address, _I32(0), _I32(3), _I32(1)])  # to read, into all caches, data

    def _product(self, weights: ir.Value, x: ir.Value, offset: ir.Value, added: ir.Value | None) -> ir.Value:
        """weights * x[offset : offset + 16] + added."""
        b = self.builder
        vector = b.load(b.bitcast(b.gep(x, [offset]), FLOATS.as_pointer()), align=4)
        if added is None:  # not to be fused: of two products that are added, either could be
            return b.fmul(weights, vector, flags=PLAIN)
        return b.fadd(added, b.fmul(weights, vector, flags=FUSE), flags=FUSE)

    def _add_scaled(self, sums: Sequence[ir.Value], scales: ir.Value | None, group: ir.Value, totals: Any) -> None:
        """totals += sums * scales[group]."""
        b = self.builder
        if scales is not None:
            scale = splat(b, b.load(b.gep(scales, [group])), FLOATS)
            sums = [b.fmul(s, scale, flags=FUSE) for s in sums]
        for s, total in zip(sums, totals, strict=True):
            b.store(b.fadd(b.load(total), s, flags=FUSE), total)

    def _single_elements(self, row: ir.Value, scales: ir.Value | None, start: ir.Value, group: ir.Value) -> ir.Value:
        """The sum over what is left of K, a column in each lane."""
        b = self.builder
        rest = cgutils.alloca_once_value(b, splat_of(0.0, RESULTS))
        with cgutils.for_range(b, b.sub(self.in_features, start), intp=_I64) as loop:
            k = b.add(start, loop.index)
            code = b.load(b.gep(row, [k]))
            if scales is not None:
                weight = _fp8_to_float(b, code, _I32, _F32)
            else:
                weight = b.fpext(b.bitcast(code, ir.HalfType()), _F32) if self.has_halves else widened(b, code)
            x = splat_of(0.0, RESULTS)
            for c, column in enumerate(self.columns):
                x = b.insert_element(x, b.load(b.gep(column, [k])), _I32(c))
            product = b.fmul(splat(b, weight, RESULTS), x, flags=PLAIN)
            if scales is not None:
                product = b.fmul(product, splat(b, b.load(b.gep(scales, [group])), RESULTS), flags=PLAIN)
            b.store(b.fadd(b.load(rest), product, flags=PLAIN), rest)
        return b.load(rest)

    def _weights(self, row: ir.Value, offset: ir.Value) -> ir.Value:
        """weights[offset : offset + 16] as floats, those of FP8 times 2^-120."""
        b = self.builder
        place = b.gep(row, [offset])
        if self.scales is not None:
            return _fp8_to_float(b, b.load(b.bitcast(place, _CODES.as_pointer()), align=1), _WORDS, FLOATS)
        bits = b.load(b.bitcast(place, _HALF_BITS.as_pointer()), align=2)
        if self.has_halves:
            return b.fpext(b.bitcast(bits, _HALVES), FLOATS)
        values = ir.Constant(FLOATS, ir.Undefined)
        for i in range(VECTOR):
            values = b.insert_element(values, widened(b, b.extract_element(bits, _I32(i))), _I32(i))
        return values


def _silu(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """x * sigmoid(x) in every lane."""
    negated = b.fsub(splat_of(-0.0, RESULTS), x, flags=PLAIN)
    negated = b.select(b.fcmp_ordered(">", negated, splat_of(88.0, RESULTS)), splat_of(88.0, RESULTS), negated)
    divisor = b.fadd(splat_of(1.0, RESULTS), exp_vector(b, negated, fuse=PLAIN), flags=PLAIN)
    return b.fdiv(x, divisor, flags=PLAIN)


def _fp8_to_float(b: ir.IRBuilder, codes: ir.Value, words: ir.Type, floats: ir.Type) -> ir.Value:
    """Sign-extend, shift, mask: float32 of the value times 2^-120."""
    shift, mask = (splat_of(value, words) for value in (20, MAGNITUDE_AND_SIGN))
    return b.bitcast(b.and_(b.shl(b.sext(codes, words), shift), mask), floats)
