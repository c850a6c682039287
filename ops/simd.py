"""Explicit SIMD for the CPU: the one inner loop that LLVM does not vectorise well by itself.

The dot product of an FP8 weight row with a vector is nearly all the time of a decode step on a CPU. Left to LLVM, the
loop becomes one chain of dependent multiply-adds (a latency of four cycles each): 6 GB/s of weights per core, where
this one reaches 13. Here four independent accumulators of eight lanes share a group, and the group's scale is applied
to lanes, so that lanes are summed once per row, not once per group.

The modules simd*.py are to the CPU what `ops.ptx` is to the GPU: no other CPU module uses the compiler's extension API.
The vector operations are LLVM's portable ones: they become AVX2, AVX-512, NEON, or scalar code.
"""

from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from numba_atomflow.ops.fp8 import GROUP, MAGNITUDE_AND_SIGN

LANES = 8
ACCUMULATORS = 4

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_CODES, _WORDS, _FLOATS = (ir.VectorType(t, LANES) for t in (_I8, _I32, _F32))
_HALF_FUNCTIONS = ("__extendhfsf2", "__gnu_h2f_ieee", "__aeabi_h2f")  # of compilers' run-time libraries
_FUSE = ("contract",)  # a multiply and an add may become one FMA


@intrinsic
def half_to_float(typing_context, bits):
    """The bits of a float16, as int16, to its value as float32: one instruction where the processor has it."""
    del typing_context

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        del signature
        if has_half_conversion(context.codegen()):
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        return widened(builder, args[0])

    return types.float32(types.int16), codegen


def has_half_conversion(codegen: Any) -> bool:
    """Whether the processor that numba compiles for has an instruction for it; else LLVM would call a library."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(_F32, [_I16]), "widen")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(builder.fpext(builder.bitcast(function.args[0], ir.HalfType()), _F32))
    parsed = binding.parse_assembly(str(module))
    parsed.triple = codegen.magic_tuple()[0]
    assembly: str = codegen._tm.emit_assembly(parsed)  # noqa: SLF001  the target machine
    return not any(name in assembly for name in _HALF_FUNCTIONS)


def widened(b: ir.IRBuilder, half: ir.Value) -> ir.Value:
    """A float16 to float32 by its bits: exact, a NaN made quiet, without float32 subnormals as intermediate values."""
    bits = b.zext(half, _I32)
    magnitude = b.shl(b.and_(bits, _I32(0x7FFF)), _I32(13))
    exponent = b.and_(magnitude, _I32(0x1F << 23))
    normal = b.add(magnitude, _I32((127 - 15) << 23))
    quiet = b.select(b.icmp_unsigned(">", magnitude, _I32(0x1F << 23)), _I32(1 << 22), _I32(0))
    special = b.or_(b.or_(magnitude, _I32(0xFF << 23)), quiet)
    least = 113 << 23  # bits of 2^-14, below which a float16 is subnormal: put there as 2^-14 (1 + m), and taken away
    difference = b.fsub(b.bitcast(b.or_(magnitude, _I32(least)), _F32), b.bitcast(_I32(least), _F32))
    finite = b.select(b.icmp_unsigned("==", exponent, _I32(0)), b.bitcast(difference, _I32), normal)
    result = b.select(b.icmp_unsigned("==", exponent, _I32(0x1F << 23)), special, finite)
    return b.bitcast(b.or_(result, b.shl(b.and_(bits, _I32(0x8000)), _I32(16))), _F32)


@intrinsic
def fp8_row_dot(typing_context, codes, scales, n, x):
    """Row n of FP8 weights times x: sum over k of e4m3(codes[n, k]) * 2^-120 * scales[n, k // 128] * x[k].

    Args:
        codes: int8 [N, K], C-contiguous.
        scales: float32 [N, ceil(K / 128)], C-contiguous.
        n: row.
        x: float32 [K], contiguous.

    Returns:
        float32; the caller undoes the factor 2^-120.
    """
    del typing_context
    signature = types.float32(codes, scales, n, x)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        codes_type, scales_type, n_type, x_type = signature.args
        codes_array = context.make_array(codes_type)(context, builder, args[0])
        scales_array = context.make_array(scales_type)(context, builder, args[1])
        x_array = context.make_array(x_type)(context, builder, args[3])
        row = context.cast(builder, args[2], n_type, types.int64)
        in_features = cgutils.unpack_tuple(builder, codes_array.shape)[1]
        groups = cgutils.unpack_tuple(builder, scales_array.shape)[1]
        row_codes = builder.gep(codes_array.data, [builder.mul(row, in_features)])
        row_scales = builder.gep(scales_array.data, [builder.mul(row, groups)])
        return _RowDot(builder, row_codes, row_scales, x_array.data).emit(in_features)

    return signature, codegen


class _RowDot:
    """Emits the loops over one row."""

    def __init__(self, builder: ir.IRBuilder, codes: ir.Value, scales: ir.Value, x: ir.Value) -> None:
        self.builder, self.codes, self.scales, self.x = builder, codes, scales, x

    def emit(self, in_features: ir.Value) -> ir.Value:
        """Whole groups, then the short last group in vectors, then what is left in single elements."""
        b = self.builder
        total = cgutils.alloca_once_value(b, ir.Constant(_FLOATS, [0.0] * LANES))
        rest = cgutils.alloca_once_value(b, ir.Constant(_F32, 0.0))
        whole_groups = b.sdiv(in_features, _I64(GROUP))
        with cgutils.for_range(b, whole_groups, intp=_I64) as loop:
            start = b.mul(loop.index, _I64(GROUP))
            sums = [ir.Constant(_FLOATS, [0.0] * LANES)] * ACCUMULATORS
            for step in range(GROUP // LANES):
                offset = b.add(start, _I64(step * LANES))
                sums[step % ACCUMULATORS] = self._multiply_add(offset, sums[step % ACCUMULATORS])
            group = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
            self._add_scaled(total, group, loop.index)

        covered = b.mul(whole_groups, _I64(GROUP))
        vectors = b.sdiv(b.sub(in_features, covered), _I64(LANES))
        with cgutils.for_range(b, vectors, intp=_I64) as loop:
            offset = b.add(covered, b.mul(loop.index, _I64(LANES)))
            self._add_scaled(total, self._multiply_add(offset, ir.Constant(_FLOATS, [0.0] * LANES)), whole_groups)

        covered = b.add(covered, b.mul(vectors, _I64(LANES)))
        with cgutils.for_range(b, b.sub(in_features, covered), intp=_I64) as loop:
            offset = b.add(covered, loop.index)
            weight = self._convert(b.load(b.gep(self.codes, [offset])), _I32)
            scaled = b.fmul(weight, b.load(b.gep(self.scales, [whole_groups])))
            product = b.fmul(scaled, b.load(b.gep(self.x, [offset])))
            b.store(b.fadd(b.load(rest), product), rest)
        return b.fadd(self._sum_lanes(b.load(total)), b.load(rest))

    def _multiply_add(self, offset: ir.Value, accumulator: ir.Value) -> ir.Value:
        """accumulator + weights[offset : offset + 8] * x[offset : offset + 8]."""
        b = self.builder
        codes = b.load(b.bitcast(b.gep(self.codes, [offset]), _CODES.as_pointer()), align=1)
        x = b.load(b.bitcast(b.gep(self.x, [offset]), _FLOATS.as_pointer()), align=4)
        product = b.fmul(self._convert(codes, _WORDS), x, flags=_FUSE)
        return b.fadd(accumulator, product, flags=_FUSE)

    def _convert(self, codes: ir.Value, words: ir.Type) -> ir.Value:
        """Sign-extend, shift, mask: float32 of the value times 2^-120."""
        b = self.builder
        floats = _FLOATS if words is _WORDS else _F32
        shift, mask = (_splat(words, value) for value in (20, MAGNITUDE_AND_SIGN))
        return b.bitcast(b.and_(b.shl(b.sext(codes, words), shift), mask), floats)

    def _add_scaled(self, total: ir.Value, group: ir.Value, index: ir.Value) -> None:
        """total += group * scales[index]."""
        b = self.builder
        scale = b.load(b.gep(self.scales, [index]))
        lane_0 = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), scale, _I32(0))
        splat = b.shuffle_vector(lane_0, lane_0, ir.Constant(_WORDS, [0] * LANES))
        product = b.fmul(group, splat, flags=_FUSE)
        b.store(b.fadd(b.load(total), product, flags=_FUSE), total)

    def _sum_lanes(self, vector: ir.Value) -> ir.Value:
        """Sum of the lanes, as a tree."""
        b = self.builder
        width = LANES
        while width > 1:
            width //= 2
            order = [i % width + (width if i < width else 0) for i in range(LANES)]
            upper = b.shuffle_vector(vector, vector, ir.Constant(_WORDS, order))
            vector = b.fadd(vector, upper)
        return b.extract_element(vector, _I32(0))


def _splat(words: ir.Type, value: int) -> ir.Constant:
    return ir.Constant(words, [value] * LANES) if words is _WORDS else ir.Constant(words, value)
