"""Online softmax over the score tiles of prefill attention, and the outputs' way to the tiled activations.

`wgmma` (64 queries of a warpgroup, 16 of a warp) and `mma.m16n8k16` leave a product in the same registers: lane 4 g + t
of a warp has, of every 8 columns j, elements 4 j and 4 j + 1 in row g and 4 j + 2 and 4 j + 3 in row g + 8, in columns
8 j + 2 t and 8 j + 2 t + 1. So two neighbouring tiles of scores are, rounded to float16, the A operand of P V.

For each row the running maximum m of the raw scores is kept, and the lane's part of the row sum l of
exp2(scale * (score - m)). A masked score is -inf: its weight is 0, and a row that has seen no key yet has m = -inf and
weights 0, not NaN. Rows that see no key at all (padding) end as 0 / 0, and are not stored.
"""

import math
from typing import Any

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.attention.prefill_plan import PrefillAttentionPlan
from numba_atomflow.ops.cuda.scalars import f32, i32, u32

MASKED = f32(-math.inf)
_ZERO = f32(0.0)


@ptx.device_function
def quad_max(x):
    """Maximum over the four lanes of a quad, which share rows of a fragment."""
    x = ptx.max_f32(x, ptx.shuffle_xor_f32(x, 1))
    return ptx.max_f32(x, ptx.shuffle_xor_f32(x, 2))


@ptx.device_function
def quad_sum(x):
    """Sum over the four lanes of a quad."""
    x += ptx.shuffle_xor_f32(x, 1)
    return x + ptx.shuffle_xor_f32(x, 2)


def make_mask(keys: int) -> Any:
    """Device function (s, start, last, t): masks the scores of a key block, s[start ...], of keys beyond the last one
    that a row sees. last: int32, for row g, counted from the block's first key; row g + 8 sees 8 keys more.
    """
    tiles = keys // 8

    @ptx.device_function
    def mask(s, start, last, t):
        last_0 = i32(last - 2 * t)
        last_1 = i32(last_0 + 8)
        for j in range(tiles):
            i = start + 4 * j
            s[i] = s[i] if i32(8 * j) <= last_0 else MASKED
            s[i + 1] = s[i + 1] if i32(8 * j + 1) <= last_0 else MASKED
            s[i + 2] = s[i + 2] if i32(8 * j) <= last_1 else MASKED
            s[i + 3] = s[i + 3] if i32(8 * j + 1) <= last_1 else MASKED

    return mask


def make_mask_window(keys: int, window: int) -> Any:
    """Device function (s, start, last, t): masks the scores of keys before a window of so many positions; arguments as
    in `make_mask`.
    """
    tiles = keys // 8

    @ptx.device_function
    def mask_window(s, start, last, t):
        before_0 = i32(last - 2 * t - window)  # the last key before the window of row g
        before_1 = i32(before_0 + 8)
        for j in range(tiles):
            i = start + 4 * j
            s[i] = MASKED if i32(8 * j) <= before_0 else s[i]
            s[i + 1] = MASKED if i32(8 * j + 1) <= before_0 else s[i + 1]
            s[i + 2] = MASKED if i32(8 * j) <= before_1 else s[i + 2]
            s[i + 3] = MASKED if i32(8 * j + 1) <= before_1 else s[i + 3]

    return mask_window


def make_softmax(keys: int, head_dim: int) -> Any:
    """Device function (s, start, maxima, row_sums, row) -> (rescale_0, rescale_1): one step of online softmax.

    Scores s[start ...] of `keys` keys become weights; maxima and row_sums are updated, at [row] of row g and at
    [row + 1] of row g + 8. The outputs so far are to be multiplied by rescale_0 and rescale_1.
    """
    tiles = keys // 8
    scale = f32(math.log2(math.e) / math.sqrt(head_dim))

    @ptx.device_function
    def softmax_of_row(s, first, maxima, row_sums, row):
        new_max = maxima[row]
        for j in range(tiles):
            new_max = ptx.max_f32(new_max, ptx.max_f32(s[first + 4 * j], s[first + 4 * j + 1]))
        new_max = quad_max(new_max)
        offset = f32(-scale) * new_max if new_max > MASKED else _ZERO
        rescale = ptx.exp2(ptx.fma(maxima[row], scale, offset))
        sum_0, sum_1 = row_sums[row] * rescale, _ZERO
        for j in range(tiles):
            p_0 = ptx.exp2(ptx.fma(s[first + 4 * j], scale, offset))
            p_1 = ptx.exp2(ptx.fma(s[first + 4 * j + 1], scale, offset))
            sum_0 += p_0
            sum_1 += p_1
            s[first + 4 * j], s[first + 4 * j + 1] = p_0, p_1
        maxima[row], row_sums[row] = new_max, sum_0 + sum_1
        return rescale

    @ptx.device_function
    def softmax(s, start, maxima, row_sums, row):
        rescale_0 = softmax_of_row(s, start, maxima, row_sums, row)
        rescale_1 = softmax_of_row(s, start + 2, maxima, row_sums, row + 1)
        return rescale_0, rescale_1

    return softmax


def make_store_rows(plan: PrefillAttentionPlan) -> Any:
    """Device function (out, o, start, row_sums, row, token, count, head, t): divides the outputs o[start ...] of rows g
    and g + 8 by their row sums, row_sums[row] and row_sums[row + 1], and writes them as tokens `token` and `token + 8`
    of the tiled activations, unless they are beyond `count`. head, token: int64.

    A lane's words of 64 elements are two whole 16-byte chunks of the tiles, if a head begins at a block's start.
    """
    word_index = plan.out.make_word_index()
    head_words, tiles = plan.head_dim // 2, plan.head_dim // 8
    whole_chunks = plan.head_dim % 64 == 0 and not plan.out.same_bits

    @ptx.device_function
    def store_row(out, o, start, inverse, token, head, t):
        if whole_chunks:
            for chunk in range(
                tiles // 4
            ):  # words t, t + 8, t + 16 and t + 24 of a block are a chunk; so are t + 4, ...
                i = start + chunk // 2 * 32 + chunk % 2 * 4
                ptx.store_16(
                    out,
                    word_index(token, head * head_words + chunk // 2 * 32 + chunk % 2 * 4 + t),
                    ptx.pack_f16x2(o[i] * inverse, o[i + 1] * inverse),
                    ptx.pack_f16x2(o[i + 8] * inverse, o[i + 9] * inverse),
                    ptx.pack_f16x2(o[i + 16] * inverse, o[i + 17] * inverse),
                    ptx.pack_f16x2(o[i + 24] * inverse, o[i + 25] * inverse),
                )
        else:
            for j in range(tiles):
                i = start + 4 * j
                word = u32(ptx.pack_f16x2(o[i] * inverse, o[i + 1] * inverse))
                out[word_index(token, head * head_words + 4 * j + t)] = word

    @ptx.device_function
    def store_rows(out, o, start, row_sums, row, token, count, head, t):
        sum_0, sum_1 = quad_sum(row_sums[row]), quad_sum(row_sums[row + 1])
        if token < count:
            store_row(out, o, start, ptx.reciprocal(sum_0), token, head, t)
        if token + 8 < count:
            store_row(out, o, start + 2, ptx.reciprocal(sum_1), token + 8, head, t)

    return store_rows
