"""Online softmax over mma tiles, and the product P V that goes with it: one step of 16 queries by 16 keys.

For each query row the running maximum m and the row sum l of exp2(score - m) are kept; a step that raises m to a new
maximum multiplies l and the outputs so far by alpha = exp2(m - new m). Scores are in units of log2(e), for `ex2`.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao et al., FlashAttention (2022).

Layout of the scores, as two `mma.m16n8k16` leave them: lane 4 g + t holds s0, s1 of row g and s2, s3 of row g + 8 for
keys 2 t and 2 t + 1, and s4 .. s7 likewise for keys 2 t + 8 and 2 t + 9.
"""

from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32, u32

LOWEST = f32(-1.0e30)  # the score of a masked key; finite, so that LOWEST - LOWEST is no NaN
_ZERO = f32(0.0)


@ptx.device_function
def quad_max(x):
    """Maximum of x over the four lanes that hold a row of the scores."""
    x = max(x, ptx.shuffle_xor_f32(x, 1))
    return max(x, ptx.shuffle_xor_f32(x, 2))


@ptx.device_function
def quad_sum(x):
    """Sum of x over the four lanes that hold a row of the scores."""
    x += ptx.shuffle_xor_f32(x, 1)
    return x + ptx.shuffle_xor_f32(x, 2)


def make_softmax_step(value_registers: int, *, half_tile: bool) -> Any:
    """Device function (m_0, m_1, l_0, l_1, scores, v_regs, out) -> the new (m_0, m_1, l_0, l_1).

    It updates running maxima and row sums, and adds P V to the unnormalised outputs. Arguments: m_0 and m_1, running
    max of rows g and g + 8; l_0 and l_1, the lane's part of their row sums; scores, the eight masked and scaled
    (s0, ..., s7); v_regs uint32, V of the 16 keys as `HeadFragments.load_value` fills it; out float32, per fragment two
    elements of row g and two of row g + 8.

    Args:
        value_registers: of `HeadFragments`.
        half_tile: an M/2 tile: rows 8 to 15 are padding. m_1 and l_1 are returned as they are, s2, s3, s6 and s7 are
            not read, and `out` has the elements of row g only.
    """
    pitch = 2 if half_tile else 4  # elements of `out` per fragment

    @ptx.device_function
    def softmax_step(m_0, m_1, l_0, l_1, scores, v_regs, out):
        s0, s1, s2, s3, s4, s5, s6, s7 = scores
        new_max_0 = max(m_0, quad_max(max(s0, s1, s4, s5)))
        new_max_1 = m_1 if half_tile else max(m_1, quad_max(max(s2, s3, s6, s7)))
        rescale_0 = ptx.exp2(m_0 - new_max_0)
        rescale_1 = _ZERO if half_tile else ptx.exp2(m_1 - new_max_1)
        s0, s1 = ptx.exp2(s0 - new_max_0), ptx.exp2(s1 - new_max_0)
        s4, s5 = ptx.exp2(s4 - new_max_0), ptx.exp2(s5 - new_max_0)
        if not half_tile:
            s2, s3 = ptx.exp2(s2 - new_max_1), ptx.exp2(s3 - new_max_1)
            s6, s7 = ptx.exp2(s6 - new_max_1), ptx.exp2(s7 - new_max_1)
        row_sum_0 = l_0 * rescale_0 + ((s0 + s1) + (s4 + s5))
        row_sum_1 = l_1 if half_tile else l_1 * rescale_1 + ((s2 + s3) + (s6 + s7))
        p0 = ptx.pack_f16x2(s0, s1)
        p1 = u32(0) if half_tile else ptx.pack_f16x2(s2, s3)
        p2 = ptx.pack_f16x2(s4, s5)
        p3 = u32(0) if half_tile else ptx.pack_f16x2(s6, s7)
        for word in range(value_registers):
            v0, v1 = v_regs[word], v_regs[value_registers + word]
            v2, v3 = v_regs[2 * value_registers + word], v_regs[3 * value_registers + word]
            for odd in range(2):
                if odd == 0:
                    b0, b1 = ptx.low_halves(v0, v1), ptx.low_halves(v2, v3)
                else:
                    b0, b1 = ptx.high_halves(v0, v1), ptx.high_halves(v2, v3)
                index = (2 * word + odd) * pitch
                c0, c1, c2, c3 = out[index] * rescale_0, out[index + 1] * rescale_0, _ZERO, _ZERO
                if not half_tile:
                    c2, c3 = out[index + 2] * rescale_1, out[index + 3] * rescale_1
                c0, c1, c2, c3 = ptx.mma(p0, p1, p2, p3, b0, b1, c0, c1, c2, c3)
                out[index], out[index + 1] = c0, c1
                if not half_tile:
                    out[index + 2], out[index + 3] = c2, c3
        return new_max_0, new_max_1, row_sum_0, row_sum_1

    return softmax_step
