"""The order of tokens by logit, as integers: sort keys.

A key is the logit's bits made monotone (NaN on top, as in NumPy's arg-max), then the complement of the id, so that the
lower id wins a tie. The arg-max is the largest key: an atomic maximum, the same in any order of the CTAs.
"""

from typing import Any

from numba import int64

from numba_atomflow.ops import ptx
from numba_atomflow.ops.cuda.scalars import f32

ID_BITS = 24
ID_MASK = (1 << ID_BITS) - 1
KEY_BITS = 32 + ID_BITS
_NAN_RANK = 0xFFFFFFFF  # above infinity's
NON_FINITE_KEY = (0x80000000 + 0x7F800000) << ID_BITS  # the least key of a logit that is +Inf or NaN
NAN_KEY = _NAN_RANK << ID_BITS | ID_MASK  # of token 0, its logit NaN
LOWEST_KEY = -1  # below every token's: what `best` holds before the arg-max

TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY = range(5)  # indices of `options`, float64 [5]


def token_of(best: int) -> int | None:
    """The token of an arg-max's key; None if its logit is +Inf or NaN."""
    return None if best >= NON_FINITE_KEY else ID_MASK - (best & ID_MASK)


@ptx.device_function
def rank(logit):
    """The logit as an integer of 32 bits in the same order; NaN on top, -0 equal to 0."""
    bits = int64(ptx.f32_bits(logit + f32(0.0)))
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return int64(_NAN_RANK)
    return 0x7FFFFFFF - magnitude if bits != magnitude else 0x80000000 + magnitude


@ptx.device_function
def sort_key(logit, token):
    """A token's key: the largest wins the arg-max."""
    return rank(logit) << ID_BITS | (ID_MASK - token)


@ptx.device_function
def token_id(key):
    """The token of a key."""
    return ID_MASK - (key & ID_MASK)


@ptx.device_function
def penalise(logit, seen, token, penalty):
    """A token's logit after the repetition penalty; `seen`: the word of the bitmap that has its bit."""
    if (int64(seen) >> (token % 32)) & 1:
        logit = logit / penalty if logit > f32(0.0) else logit * penalty
    return logit


@ptx.device_function
def penalised(logits, seen, token, penalty):
    """The token's logit after the repetition penalty; `seen`: the whole bitmap."""
    return penalise(logits[token], seen[token // 32], token, penalty)


def make_warp_max_key(columns: int) -> Any:
    """Device function (key) -> the largest key of the warp's lanes whose number is the same modulo `columns`, a power
    of two; `LOWEST_KEY` if all of them have that.
    """
    steps = 6 - columns.bit_length()

    @ptx.device_function
    def largest_key(key):
        for step in range(steps):
            high = int64(ptx.shuffle_xor_u32((key >> 31) & 0xFFFFFFFF, 16 >> step))
            low = int64(ptx.shuffle_xor_u32(key & 0x7FFFFFFF, 16 >> step))
            other = int64(LOWEST_KEY) if high == 0xFFFFFFFF else high << 31 | low
            key = max(key, other)
        return key

    return largest_key


warp_max_key = make_warp_max_key(1)
