"""Float16 to float32 for the CPU: one instruction where the processor has it, else by the bits."""

from typing import Any

from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_HALF_FUNCTIONS = ("__extendhfsf2", "__gnu_h2f_ieee", "__aeabi_h2f")  # of compilers' run-time libraries


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
