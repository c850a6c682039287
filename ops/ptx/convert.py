"""Conversions between FP8, float16 and float32, and moves of bits. A pair of float16 is one 32-bit word."""

import struct

import numpy as np

from numba_atomflow.ops.ptx.core import f32, instruction, u16, u32
from numba_atomflow.ops.ptx.simulator import f16_pair


@instruction(
    "{ .reg .b32 s, t, w; shl.b32 w, $2, 8;"
    " shr.u32 t, $2, 1; and.b32 t, t, 0x3f803f80; and.b32 s, $2, 0x80008000; or.b32 $0, s, t;"
    " shr.u32 t, w, 1; and.b32 t, t, 0x3f803f80; and.b32 s, w, 0x80008000; or.b32 $1, s, t; }",
    (u32, u32),
    (u32,),
)
def convert_fp8_bits(word):
    """Four E4M3 codes to two pairs of float16, times 2^-8: bytes 1 and 3, then bytes 0 and 2. On every architecture.

    The seven magnitude bits of a code become exponent and mantissa of a float16; the biases differ by 15 - 7 = 8.
    """
    word = int(word)
    low = (word << 8) & 0xFFFFFFFF
    return tuple((w >> 1) & 0x3F803F80 | w & 0x80008000 for w in (word, low))


@instruction(
    "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; cvt.rn.f16x2.e4m3x2 $1, h; }", (u32, u32), (u32,)
)
def convert_fp8_cvt(word):
    """Four E4M3 codes to two pairs of float16: bytes 0 and 1, then bytes 2 and 3. Since sm_89."""
    from numba_atomflow.ops.fp8 import e4m3_table

    codes = np.frombuffer(struct.pack("<I", int(word)), np.uint8)
    pairs = e4m3_table()[codes].astype(np.float16).view(np.uint32)
    return int(pairs[0]), int(pairs[1])


@instruction(
    "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
    " mov.b32 $0, {l, h}; }",
    (u32,),
    (f32,) * 4,
)
def pack_e4m3x4(a, b, c, d):
    """Four float32 rounded to E4M3 codes in one word, a in the lowest byte; saturated at 448. Since sm_89."""
    from numba_atomflow.ops.fp8 import encode_e4m3

    values = np.array([a, b, c, d], np.float32)
    invalid = np.isnan(values)
    codes = np.where(invalid, 0x7F, encode_e4m3(np.where(invalid, 0, values))).astype(np.uint8)
    return int(codes.view(np.uint32)[0])


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", (u32,), (f32, f32))
def pack_f16x2(low, high):
    """Two float32 rounded to float16 in one word."""
    with np.errstate(over="ignore"):
        return int(np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0])


@instruction("cvt.rn.f16.f32 $0, $1;", (u16,), (f32,))
def f16_bits(value):
    """A float32 rounded to float16, as its 16 bits."""
    with np.errstate(over="ignore"):
        return int(np.float32(value).astype(np.float16).view(np.uint16))


@instruction("{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", (f32, f32), (u32,))
def unpack_f16x2(word):
    """The two float16 of a word, as float32 (exact)."""
    low, high = f16_pair(word)
    return np.float32(low), np.float32(high)


@instruction("mov.b32 $0, $1;", (u32,), (f32,))
def f32_bits(value):
    """The 32 bits of a float32."""
    return int(np.float32(value).view(np.uint32))


@instruction("mov.b32 $0, $1;", (f32,), (u32,))
def bits_f32(word):
    """The float32 with these 32 bits."""
    return np.uint32(word).view(np.float32)


@instruction("prmt.b32 $0, $1, $2, 0x5410;", (u32,), (u32, u32))
def low_halves(a, b):
    """The low 16 bits of a, below those of b."""
    return (int(a) & 0xFFFF) | (int(b) & 0xFFFF) << 16


@instruction("prmt.b32 $0, $1, $2, 0x7632;", (u32,), (u32, u32))
def high_halves(a, b):
    """The high 16 bits of a, below those of b."""
    return int(a) >> 16 | int(b) & 0xFFFF0000


@instruction("prmt.b32 $0, $1, $2, $3;", (u32,), (u32, u32, u32))
def permute_bytes(a, b, selector):
    """Four of the 8 bytes of a (0 to 3) and b (4 to 7), by the hexadecimal digits of `selector`, lowest first."""
    both = int(a) | int(b) << 32
    return sum((both >> 8 * (int(selector) >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
