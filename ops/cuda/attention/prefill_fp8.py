"""Outputs of prefill attention as FP8 tiles: x of an o projection with FP8 activations.

Heads of 128 only: a head is one K block, a group with one scale. Of a row of O a lane 4 g + t has columns 8 j + 2 t and
8 j + 2 t + 1; two neighbouring lanes have words of four codes, and all words of a 16-byte chunk of the tiles: chunk
4 h + 2 b + t / 2 has those of j = 8 h + 2 p + b for p = 0 to 3. Of the pair, the even lane takes row g and the odd one
row g + 8. Nothing is rounded between O and the codes.
"""

from typing import Any

from numba import cuda, uint32

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.attention.prefill_softmax import quad_max, quad_sum
from numba_atomflow.ops.cuda.layout.activations import BLOCK_WORDS
from numba_atomflow.ops.cuda.layout.fp8_activations import group_scale
from numba_atomflow.ops.cuda.scalars import f32, u32

HEAD_DIM = 128
_FRAGMENTS = HEAD_DIM // 8


def make_store_rows_fp8(plan: PrefillAttentionPlan) -> Any:
    """Device function with the arguments of `prefill_softmax.make_store_rows`, for FP8 tiles."""
    block_words, scales_start, scale_pitch = plan.out.block_words, plan.out.scales_start, plan.out.tokens

    @ptx.device_function
    def largest_of(o, start):
        largest = f32(0.0)
        for j in range(_FRAGMENTS):
            largest = ptx.max_f32(largest, abs(o[start + 4 * j]))
            largest = ptx.max_f32(largest, abs(o[start + 4 * j + 1]))
        return quad_max(largest)

    @ptx.device_function
    def store_rows(out, o, start, row_sums, row, token, count, head, t):
        words = cuda.local.array(_FRAGMENTS, uint32)
        inverse_0, inverse_1 = ptx.reciprocal(quad_sum(row_sums[row])), ptx.reciprocal(quad_sum(row_sums[row + 1]))
        scale_0, factor_0 = group_scale(largest_of(o, start) * inverse_0)
        scale_1, factor_1 = group_scale(largest_of(o, start + 2) * inverse_1)
        factor_0, factor_1 = factor_0 * inverse_0, factor_1 * inverse_1
        odd = t & 1
        for j in range(_FRAGMENTS):
            i = start + 4 * j
            own = ptx.pack_e4m3x4(o[i] * factor_0, o[i + 1] * factor_0, o[i + 2] * factor_1, o[i + 3] * factor_1)
            other = ptx.shuffle_xor_u32(own, 1)
            words[j] = ptx.high_halves(other, own) if odd else ptx.low_halves(own, other)
        mine = token + 8 * odd
        if mine < count:
            if t < 2:
                out[scales_start + head * scale_pitch + mine] = u32(ptx.f32_bits(scale_1 if odd else scale_0))
            begin, swizzle = head * block_words + mine * BLOCK_WORDS, mine & 7
            for h in range(2):
                for b in range(2):
                    j = 8 * h + b
                    chunk = (4 * h + 2 * b + (t >> 1)) ^ swizzle
                    ptx.store_16(out, begin + chunk * 4, words[j], words[j + 2], words[j + 4], words[j + 6])

    return store_rows
