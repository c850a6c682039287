"""Explicit SIMD for prompts: panels of weights, dequantized and transposed.

A panel (ops/simd_gemm.py) holds COLUMNS rows of a weight [N, K] as columns. Four codes of each of LANES rows are loaded
as one word per lane; shifts and a mask bring each code of the word to float32, as in `fp8.convert_biased`.

Cost model: LANES loads, 4 * 4 vector operations and 4 stores per 4 * LANES weights: with AVX-512 0.12 ns a weight, as
much as 1.3 tokens through the kernel for one token.
"""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numba_atomflow.ops.fp8 import GROUP, MAGNITUDE_AND_SIGN
from numba_atomflow.ops.simd import has_half_conversion, widened
from numba_atomflow.ops.simd_gemm import COLUMNS, FLOATS, LANES, WORDS, data_of, floats, store, words

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_CODES, _HALF_BITS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_I8, _I16, ir.HalfType()))
_INDEX = types.int64


@intrinsic
def quantized_columns(typing_context, codes, scales, first, begin, count, panel, start):
    """Part of LANES rows of an FP8 weight, dequantized: panel[start + k * COLUMNS + i] = weight[first + i, begin + k].

    Args:
        codes: int8 [N, K]. scales: float32 [N, ceil(K / 128)]. Both C-contiguous.
        first: row; rows behind the weight's last are the last again.
        begin, count: the part of K; begin is a multiple of 128.
        panel: float32, contiguous.
    """
    del typing_context, first, begin, count, start
    signature = types.void(codes, scales, _INDEX, _INDEX, _INDEX, panel, _INDEX)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, _, first, begin, count, _, start) = builder, args
        codes, scales = (context.make_array(signature.args[i])(context, b, args[i]) for i in (0, 1))
        rows, in_features = cgutils.unpack_tuple(b, codes.shape)
        groups = cgutils.unpack_tuple(b, scales.shape)[1]
        code_rows = _row_pointers(b, codes.data, first, rows, in_features)
        scale_rows = _row_pointers(b, scales.data, first, rows, groups)
        out = b.gep(data_of(context, b, signature.args[5], args[5]), [start])

        def put(shifted: ir.Value, scale: ir.Value, k: ir.Value) -> None:
            """Codes in the upper bytes: to floats times 2^-120, scaled."""
            values = b.bitcast(b.and_(b.ashr(shifted, words(4)), words(MAGNITUDE_AND_SIGN)), FLOATS)
            store(b, b.fmul(values, scale), out, b.mul(k, _I64(COLUMNS)))

        with cgutils.for_range(b, b.sdiv(b.add(count, _I64(GROUP - 1)), _I64(GROUP)), intp=_I64) as loop:
            group_start = b.mul(loop.index, _I64(GROUP))
            group = b.add(b.sdiv(begin, _I64(GROUP)), loop.index)
            scale = b.fmul(_gather(b, scale_rows, group, FLOATS), floats(2.0**120))
            width = b.sub(count, group_start)
            width = b.select(b.icmp_signed("<", width, _I64(GROUP)), width, _I64(GROUP))
            quads = b.sdiv(width, _I64(4))
            with cgutils.for_range(b, quads, intp=_I64) as inner:
                k = b.add(group_start, b.mul(inner.index, _I64(4)))
                quad = _gather(b, code_rows, b.add(begin, k), WORDS)
                for i in range(4):
                    put(b.shl(quad, words(24 - 8 * i)), scale, b.add(k, _I64(i)))
            covered = b.mul(quads, _I64(4))
            with cgutils.for_range(b, b.sub(width, covered), intp=_I64) as inner:
                k = b.add(group_start, b.add(covered, inner.index))
                code = b.zext(_gather(b, code_rows, b.add(begin, k), _CODES), WORDS)
                put(b.shl(code, words(24)), scale, k)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def float16_columns(typing_context, bits, first, begin, count, panel, start):
    """Part of LANES rows of a float16 weight: panel[start + k * COLUMNS + i] = weight[first + i, begin + k].

    Args:
        bits: int16 [N, K], C-contiguous.
        first: row; rows behind the weight's last are the last again.
        begin, count: the part of K.
        panel: float32, contiguous.
    """
    del typing_context, first, begin, count, start
    signature = types.void(bits, _INDEX, _INDEX, _INDEX, panel, _INDEX)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        b, (_, first, begin, count, _, start) = builder, args
        array = context.make_array(signature.args[0])(context, b, args[0])
        rows, in_features = cgutils.unpack_tuple(b, array.shape)
        pointers = _row_pointers(b, array.data, first, rows, in_features)
        out = b.gep(data_of(context, b, signature.args[4], args[4]), [start])
        convert = has_half_conversion(context.codegen())

        def put(halves: ir.Value, k: ir.Value) -> None:
            if convert:
                values = b.fpext(b.bitcast(halves, _HALVES), FLOATS)
            else:
                values = ir.Constant(FLOATS, ir.Undefined)
                for i in range(LANES):
                    values = b.insert_element(values, widened(b, b.extract_element(halves, _I32(i))), _I32(i))
            store(b, values, out, b.mul(k, _I64(COLUMNS)))

        pairs = b.sdiv(count, _I64(2))
        with cgutils.for_range(b, pairs, intp=_I64) as loop:
            k = b.mul(loop.index, _I64(2))
            pair = _gather(b, pointers, b.add(begin, k), WORDS)
            put(b.trunc(pair, _HALF_BITS), k)
            put(b.trunc(b.lshr(pair, words(16)), _HALF_BITS), b.add(k, _I64(1)))
        covered = b.mul(pairs, _I64(2))
        with cgutils.for_range(b, b.sub(count, covered), intp=_I64) as loop:
            k = b.add(covered, loop.index)
            put(_gather(b, pointers, b.add(begin, k), _HALF_BITS), k)
        return context.get_dummy_value()

    return signature, codegen


def _row_pointers(b: ir.IRBuilder, data: ir.Value, first: ir.Value, rows: ir.Value, width: ir.Value) -> list[ir.Value]:
    """Pointers to rows first .. first + LANES - 1 of an array [rows, width]; none behind the last row."""
    last = b.sub(rows, _I64(1))
    pointers = []
    for i in range(LANES):
        row = b.add(first, _I64(i))
        row = b.select(b.icmp_signed("<", row, last), row, last)
        pointers.append(b.gep(data, [b.mul(row, width)]))
    return pointers


def _gather(b: ir.IRBuilder, rows: Sequence[ir.Value], index: ir.Value, vector: ir.VectorType) -> ir.Value:
    """What lies at this index of each row, as elements of a vector."""
    gathered = ir.Constant(vector, ir.Undefined)
    for i, row in enumerate(rows):
        pointer = b.bitcast(b.gep(row, [index]), vector.element.as_pointer())
        gathered = b.insert_element(gathered, b.load(pointer, align=1), _I32(i))
    return gathered
